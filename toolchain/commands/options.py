"""The options of the commands: those that follow from the configuration, their help in sections, and what was given of them."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
from click.shell_completion import CompletionItem

from ..option import flag

EXIT_CODES = """\b
Exit codes: 0 done, 2 usage, 3 unsupported model, 4 bad data, 5 failed export or parity,
6 accuracy drop above --max-drop (the model is written), 7 broken installation, 8 run folder cannot be written (full disk),
9 rules of a target broken (`check`, `export`), 10 another process of a torchrun is gone,
11 too little memory on the device, 130 interrupted, 143 terminated."""

_SECTIONS = {
    "precision": "Precision",
    "method": "Method",
    "data": "Data",
    "images": "Image folders",
    "calibration": "Calibration",
    "units": "Units (MRECG)",
    "reconstruction": "Reconstruction",
}
PATH = click.Path(path_type=Path)


class SectionedCommand(click.Command):
    """Groups the options of `--help` under the sections that the configuration fields name."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        grouped: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                grouped.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title in ("Options", *_SECTIONS.values()):
            if title in grouped:
                with formatter.section(title):
                    formatter.write_dl(grouped[title])


class Option(click.Option):
    """An option with its section of `--help`, for which shells offer the words of its metavar (`a|b|c`), or files."""

    def __init__(self, *args: Any, section: str = "Options", is_file: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section, self._is_file = section, is_file

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if self.metavar is not None and "|" in self.metavar:
            return [CompletionItem(word) for word in self.metavar.split("|") if word.startswith(incomplete)]
        return [CompletionItem(incomplete, type="file")] if self._is_file else super().shell_complete(ctx, incomplete)


def config_options(
    *halves: type, only: str | None = None, hidden: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """One option for each field of the configuration classes, or of one section; None means that the flag was not given.

    `hidden` ones are taken, so that the command can say why it refuses them, but not shown.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for half in reversed(halves):
            hints = get_type_hints(half)
            for spec in reversed([spec for spec in dataclasses.fields(half) if only in (None, spec.metadata["section"])]):
                kinds = [kind for kind in (get_args(hints[spec.name]) or (hints[spec.name],)) if kind is not type(None)]
                choices = spec.metadata.get("choices")
                text = spec.metadata["help"]
                if spec.default not in (None, ()):
                    shown = ("off", "on")[spec.default] if isinstance(spec.default, bool) else spec.default
                    text += f"  [default: {shown}]"
                common: dict[str, Any] = {
                    "default": None,
                    "help": text,
                    "section": _SECTIONS[spec.metadata["section"]],
                    "cls": Option,
                    "is_file": spec.metadata.get("is_file", False),
                    "hidden": spec.name in hidden,
                }
                name = flag(spec.name)
                if hints[spec.name] == tuple[str, ...]:
                    command = click.option(name, spec.name, multiple=True, metavar="TEXT", **common)(command)
                elif kinds == [bool]:
                    command = click.option(f"{name}/--no-{name[2:]}", spec.name, **common)(command)
                else:
                    metavar = "|".join(map(str, choices)) if choices else None
                    command = click.option(name, spec.name, type=kinds[0], metavar=metavar, **common)(command)
        return command

    return decorate


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `config_options` that were given."""
    return {name: value for name, value in options.items() if value not in (None, ())}
