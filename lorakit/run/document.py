"""YAML as a recipe is read: a key that stands twice is an error, where plain YAML silently takes the last."""

from typing import Any

from lorakit.errors import RecipeError


def read_yaml(text: str, name: str) -> Any:
    """The value of a YAML text. name: for messages. Raises RecipeError for bad syntax, tags and keys that stand twice."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_keys(node)
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{name} is no YAML: {error}") from error
    except ValueError as error:  # a date that no calendar has, a number out of range
        raise RecipeError(f"{name}: {error}") from error


def _check_keys(node: Any) -> None:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _check_keys(one)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ValueError(f"{key.value!r} stands twice (line {key.start_mark.line + 1})")
            seen.add(str(key.value))
            _check_keys(value)
