import io

from rich.console import Console as RichConsole

from dmoe.metrics import Console
from dmoe.metrics.console import plain_line, printable

ROW = {
    "step": 100,
    "tokens": 409600,
    "loss": 2.10341,
    "ppl": 8.19,
    "lr": 3e-4,
    "grad_norm": 0.914,
    "tokens_per_second": 21034.4,
    "moe/load_cv_mean": 0.2,
}
LINE = "step=100 tokens=409600 loss=2.1034 lr=3.0e-04 grad_norm=0.91 tokens_per_second=21034"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_plain_line_is_stable():
    assert plain_line(ROW) == LINE


def test_plain_line_of_an_evaluation():
    row = {"step": 5, "eval_loss": 2.0, "eval_bits_per_byte": 2.88539, "k": None}
    assert plain_line(row) == "step=5 eval_loss=2.0000 eval_bits_per_byte=2.8854"
    assert plain_line({**row, "k": [2, 4]}).endswith(" k=[2,4]")
    assert plain_line({**row, "k": 2}).endswith(" k=2")


def test_plain_line_shows_a_loss_that_is_no_number():
    assert plain_line({"step": 1, "loss": float("nan")}) == "step=1 loss=nan"


def test_without_a_terminal_rows_are_whole_lines():
    out = io.StringIO()
    console = Console(200, file=out)
    console.row(ROW)
    console.message("saved [bold]x[/bold] " + "y" * 200)
    console.close()
    assert out.getvalue().splitlines() == [LINE, "saved [bold]x[/bold] " + "y" * 200]


def test_disabled_prints_nothing():
    for out in (io.StringIO(), Terminal()):
        console = Console(200, enabled=False, file=out)
        console.row(ROW)
        console.message("x")
        console.close()
        assert out.getvalue() == ""


def test_on_a_terminal_the_line_is_live_and_messages_stay(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    console = Console(200, file=out)
    console.row(ROW)
    console.message("[red]message")
    console.row({"step": 100, "eval_loss": 2.0})
    console.close()
    shown = RichConsole().render_str(out.getvalue(), markup=False).plain
    assert "100/200" in shown
    assert "loss=2.1034 lr=3.0e-04 grad_norm=0.91 tok/s=21034" in shown
    assert "[red]message\n" in shown.replace("\r", "")
    assert "step=100 eval_loss=2.0000\n" in shown.replace("\r", "")


def test_control_characters_are_escaped():
    assert printable("a\x1b[31m\x07\u202e\n\tü🙂") == "a\\x1b[31m\\x07\\u202e\n\tü🙂"
    assert printable("ü", "ascii") == "\\xfc"
    assert printable("\ud800") == "\\ud800"
