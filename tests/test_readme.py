"""The README and docs/config.md are true: what they show runs, and what they name exists."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from dmoe.cli import main
from dmoe.config import load_config
from dmoe.data import prepare
from dmoe.metrics import METRICS, MOE_STATISTICS
from dmoe.models.counts import num_active_params, num_params

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What makes any run of the README a matter of a second, in one process.
SMALL = [
    "parallel.ep=1",
    "model.dim=16",
    "model.ffn_dim=16",
    "model.moe.expert_ffn_dim=8",
    "data.sources.0.path=data/mine",
    "train.steps=2",
    "train.seq_len=32",
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
    "eval.sample_tokens=2",
    "metrics.tensorboard=false",
]


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Return the command lines of the shell blocks, in order."""
    return [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]


def files_of_the_map() -> list[str]:
    """Return the paths in the tree of the file map."""
    [tree] = [block for block in blocks("text") if block.startswith("dmoe/\n")]
    paths: list[str] = []
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        if not name.endswith("/"):
            paths.append("".join(folders))
    return paths


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the configs, those of the README too, some text, and a trained run."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for block in blocks("yaml"):
        (folder / block.split()[1]).write_text(block)
    (folder / "text").mkdir()
    (folder / "text" / "readme.txt").write_text(README)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # As the README does it; to ask for the same again is to be given it.
        prepare(["text/"], "data/mine", split_paragraphs=True)
        assert main(["train", "configs/quickstart.yaml", *SMALL]) == 0
    return folder


def test_the_file_map_is_complete() -> None:
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "dmoe").rglob("*.py")}
    named = files_of_the_map()
    assert len(named) == len(set(named))
    assert {path for path in files if not path.endswith("__init__.py")} == set(named)


def test_links_and_paths_lead_somewhere() -> None:
    paths = re.findall(r"\]\(([^#)]+)\)", README)
    paths += re.findall(r"`((?:dmoe|configs|tests|tools|docs)/[\w./]*)`", README)
    written = {block.split()[1] for block in blocks("yaml")}
    assert not [path for path in paths if not (ROOT / path).exists() and path not in written]


def test_commands_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    verbs = [words[1:] for words in commands() if words[0] == "dmoe"]
    assert len(verbs) > 5
    for words in verbs:
        # A later override wins over that of the README.
        assert main([*words, *SMALL] if words[0] == "train" else words) == 0, words


def test_torchrun_commands_name_configs_that_load(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    launches = [words for words in commands() if words[0] == "torchrun"]
    assert launches
    for words in launches:
        config, *overrides = words[words.index("dmoe.train") + 1 :]
        load_config(config, overrides)


@pytest.mark.parametrize("verb", re.findall(r"^\| `dmoe ([a-z -]+[a-z])", README, re.MULTILINE))
def test_verbs_exist(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    assert f" {verb} [OPTIONS]" in capsys.readouterr().out


def test_make_targets_exist() -> None:
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    mentioned = re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE)
    assert mentioned
    assert set(mentioned) <= set(rules)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_snippets_run(number: int, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    script = workplace / f"snippet_{number}.py"
    script.write_text(blocks("python")[number])
    runpy.run_path(str(script))


def test_the_configs_have_the_parameters_of_the_table() -> None:
    rows = re.findall(
        r"^\| `(configs/\w+\.yaml)` \| ([\d.,]+) \| ([\d.,]+) \|", README, re.MULTILINE
    )
    paths = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml")}
    assert {path for path, _, _ in rows} == paths - {"configs/base_large.yaml"}
    for path, total, active in rows:
        model = load_config(ROOT / path).model
        counted = (num_params(model), num_active_params(model))
        assert (total, active) == tuple(f"{count / 1e6:,.1f}" for count in counted), path


def test_all_metrics_are_named() -> None:
    rows = [f"| `{metric.key}` | `{metric.tensorboard}` |" for metric in METRICS]
    rows += [f"| `{name}` |" for name in MOE_STATISTICS]
    assert not [row for row in rows if row not in README]


def test_the_config_reference_is_that_of_the_code() -> None:
    printed = runpy.run_path(str(ROOT / "tools" / "config_reference.py"))["reference"]()
    assert (ROOT / "docs" / "config.md").read_text() == printed, (
        "print it again: python tools/config_reference.py > docs/config.md"
    )
