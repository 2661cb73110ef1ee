"""From labels to prompts: every template with every style, for every label."""

from __future__ import annotations

from collections.abc import Sequence

from gptfl_dist.config.federation import Prompts


def build_prompts(prompts: Prompts, labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The prompts of each label, without duplicates, templates in file order and styles within each template.

    The style is filled in before the label, so that a label that contains braces stays as it is.
    """
    styles = prompts.styles or [""]
    patterns = [template.replace("{style}", style) for template in prompts.templates for style in styles]
    return {label: tuple(dict.fromkeys(pattern.replace("{label}", label) for pattern in patterns)) for label in labels}
