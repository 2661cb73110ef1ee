"""From labels to prompts: from templates and styles, or from a prompt set, a file of prompts by label.

A prompt set is YAML, `label: [prompt, ...]` for every label of the federation, made to be read and edited. It counts as
it stands: no template is filled in, and a prompt need not name its label.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml

from gptfl_dist.config.document import describe, mapping_items, read_document
from gptfl_dist.config.synthesis import Prompts

_MAX_BYTES = 2**24  # 100 labels of 200 sentences are 2 MiB, and take 2 s to read
_EXPECTED = "expected a list of at least one prompt"
_HINT = "It must hold `label: [prompt, ...]` for every label; `gptfl prompts FEDERATION_FILE` makes such a file."


def build_prompts(prompts: Prompts, labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The prompts of each label, without duplicates, in the order of the file. Raises ConfigError for a prompt set."""
    if prompts.file is not None:
        return read_prompt_set(prompts.file, labels)
    return {label: fill_templates(prompts, label) for label in labels}


def fill_templates(prompts: Prompts, name: str) -> tuple[str, ...]:
    """Every template with every style for one name, without duplicates, the styles within each template.

    The style is filled in before the name, so that a name that contains braces stays as it is.
    """
    styles = prompts.styles or [""]
    patterns = [template.replace("{style}", style) for template in prompts.templates for style in styles]
    return tuple(dict.fromkeys(pattern.replace("{label}", name) for pattern in patterns))


def read_prompt_set(file: Path, labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The prompts of a prompt set, in the order of `labels`. Raises ConfigError with all that is wrong, by line."""
    document = read_document(file, max_bytes=_MAX_BYTES, hint=_HINT)
    assert isinstance(document.root, yaml.MappingNode)  # read_document raises for anything else
    nodes = {key.value: (key, node) for key, node in mapping_items(document.root)}
    found: dict[str, tuple[str, ...]] = {}
    for label, (key, node) in nodes.items():
        if label not in labels:
            near = difflib.get_close_matches(label, labels, n=1)
            known = f"did you mean {near[0]}?" if near else f"its labels are {', '.join(labels)}"
            document.report(key, (label,), f"the federation has no such label; {known}")
        elif not isinstance(node, yaml.SequenceNode) or not node.value:
            document.report(node, (label,), f"found {describe(node)}, {_EXPECTED}")
        else:
            for index, item in enumerate(node.value):
                if not _is_text(item):
                    document.report(item, (label, index), f"found {describe(item)}, expected text{_quoted(item)}")
            found[label] = tuple(dict.fromkeys(item.value for item in node.value if _is_text(item)))
    missing = [label for label in labels if label not in nodes]
    if missing:
        document.report(document.root, (), f"no prompts for {', '.join(missing)}, {_EXPECTED} for each label")
    if document.problems:
        raise document.error()
    return {label: found[label] for label in labels}


def _is_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag.endswith(":str") and bool(node.value.strip())


def _quoted(node: yaml.Node) -> str:
    """What to do about a number or a truth value that was meant as text."""
    return f': quote it as "{node.value}"' if isinstance(node, yaml.ScalarNode) and node.value.strip() else ""
