"""Our dialect of YAML: the scalars of YAML 1.2, so `3e-4` is a number and `no` is a word.

PyYAML follows YAML 1.1, where both are otherwise. `reader` reads the dialect, `export` writes it.
"""

import re

import yaml

from dmoe.config.node import Scalar

_TAG = "tag:yaml.org,2002:"
# The order decides: every decimal int would match as a float too.
_PATTERNS = {
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}
_RESOLVERS = [(_TAG + kind, pattern) for kind, pattern in _PATTERNS.items()]
_FIRST_CHARACTERS = ["", *"~nNtTfF-+.0123456789"]


class Loader(yaml.SafeLoader):
    """Composes nodes whose plain scalars are tagged by YAML 1.2; it constructs no objects."""


class Dumper(yaml.SafeDumper):
    """Quotes a string that YAML 1.1 or 1.2 would read as something else, so every reader agrees."""

    def ignore_aliases(self, data: object) -> bool:
        """Write equal values out in full: `&id001` helps no reader of a config."""
        return True


# PyYAML looks the resolvers of a plain scalar up by its first character, in a table on the class.
Loader.yaml_implicit_resolvers = dict.fromkeys(_FIRST_CHARACTERS, _RESOLVERS)
_OLD = yaml.SafeDumper.yaml_implicit_resolvers
Dumper.yaml_implicit_resolvers = {
    character: Loader.yaml_implicit_resolvers.get(character, []) + _OLD.get(character, [])
    for character in {*_FIRST_CHARACTERS, *_OLD}
}


def scalar_value(node: yaml.Node) -> Scalar:
    """Return the value of a scalar node of the dialect.

    Raises:
        ValueError: Its tag is not of the dialect, or its text does not fit the tag.
    """
    text, kind = node.value, node.tag.removeprefix(_TAG)
    if not isinstance(node, yaml.ScalarNode) or kind not in ("str", *_PATTERNS):
        raise ValueError(
            f"tag {node.tag.replace(_TAG, '!!')} is not allowed; a config holds plain values only"
        )
    if kind == "str":
        # JSON escapes a rare character as a pair of surrogates; a lone surrogate is no text.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    if not _PATTERNS[kind].match(text):
        raise ValueError(f"{text!r} is not a valid {kind}")
    match kind:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
        case _:
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
