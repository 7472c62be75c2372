"""What `apo-trl run` does to a script: refuse options that the script does not read, and apply `--set`."""

import argparse
import contextlib
import dataclasses
import functools
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS
from trl import DPOConfig, TrlParser

from apo_trl.config import APOConfig
from apo_trl.errors import InputError, nearest
from apo_trl.training.console import is_local_main_process
from apo_trl.training.lock import output_lock

__all__ = ["checked_script"]


@contextlib.contextmanager
def checked_script(script: str, arguments: Sequence[str], settings: Sequence[str]) -> Iterator[None]:
    """Set `sys.argv`, check that the code inside reads all of it, and apply `--set` to its configurations.

    Raises:
        InputError: An argument is not read, or a setting is unknown, has the wrong type or cannot be applied.
    """
    sys.argv = argv = _Arguments([script, *arguments])
    with contextlib.ExitStack() as stack:
        callback = _Check(argv, _typed(settings), stack)
        stack.enter_context(_wrapped(argparse.ArgumentParser, "parse_known_args", argv.parse_known_args))
        stack.enter_context(_wrapped(TrlParser, "set_defaults_with_config", argv.set_defaults_with_config))
        stack.enter_context(_wrapped(DPOConfig, "__post_init__", callback.post_init))
        stack.enter_context(_wrapped(APOConfig, "__post_init__", callback.post_init))
        DEFAULT_CALLBACKS.append(callback)
        stack.callback(DEFAULT_CALLBACKS.remove, callback)
        try:
            yield
        except SystemExit as stop:
            if stop.code:
                raise
        callback.finish()


class _Arguments(list[str]):
    """`sys.argv`, or what a parser leaves of it, which records what the script reads of it."""

    def __init__(self, argv: Sequence[str]) -> None:
        super().__init__(argv)
        self.given = list(argv[1:])
        self.known: set[str] = set()  # options of the script's parsers
        self.read: set[str] = set()
        self.copied: set[str] = set()  # read as well, unless the copy is for a parser, which knows some

    def __getitem__(self, index: Any) -> Any:
        result = super().__getitem__(index)
        self.copied.update(result) if isinstance(index, slice) else self.read.add(result)
        return result

    def __contains__(self, argument: object) -> bool:
        self.read.add(str(argument))
        return super().__contains__(argument)

    def __iter__(self) -> Iterator[str]:
        self.copied.update(self.given)
        return super().__iter__()

    def __add__(self, other: Any) -> Any:
        return self[:] + other

    def copy(self) -> Any:
        return self[:]

    def index(self, argument: Any, *bounds: Any) -> int:
        self.read.add(argument)
        return super().index(argument, *bounds)

    def remove(self, argument: Any) -> None:
        self.read.add(argument)
        super().remove(argument)

    def pop(self, index: Any = -1) -> str:
        argument = super().pop(index)
        self.read.add(argument)
        return argument

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (super().copy(),)  # the processes of a data loader get a plain list

    def parse_known_args(self, original: Any, parser: Any, args: Any = None, namespace: Any = None) -> Any:
        args, unknown = sys.argv[1:] if args is None else list(args[:]), list[str]()
        try:
            namespace, unknown = original(parser, args, namespace)
        finally:
            self.copied.difference_update(args)
            self.read.update(set(args).difference(unknown))
            self.known.update(parser._option_string_actions)
        leftover = _Arguments(unknown)
        leftover.given, leftover.read, leftover.copied = unknown, self.read, self.copied
        return namespace, leftover

    def set_defaults_with_config(self, original: Any, parser: Any, **config: Any) -> Any:
        unknown = original(parser, **config)  # keys of the `--config` file, as options with their values
        self.read.update({f"--{key}" for key in config}.difference(unknown))
        self.given += unknown
        return unknown

    def options(self) -> list[list[str]]:
        """Return each option with its values."""
        options: list[list[str]] = []
        for argument in self.given:
            starts = not options or re.match("--?[A-Za-z]", argument)
            options.append([argument]) if starts else options[-1].append(argument)
        return options


class _Check(TrainerCallback):
    """Applies `--set`, and checks each trainer that is built: its options, its settings, its output folder."""

    def __init__(self, argv: _Arguments, settings: dict[str, Any], stack: contextlib.ExitStack) -> None:
        self.argv, self.script, self.settings, self.stack = argv, Path(argv[0]).name, settings, stack
        self.applied: dict[str, Any] = {}  # the settings as `__post_init__` leaves them
        self.folders: set[Path] = set()  # locked until the script ends, which may save a model after training
        self.has_trainer = False

    def post_init(self, original: Any, config: Any) -> None:
        changes = []
        for key, value in self.settings.items():
            if not hasattr(config, key):
                raise InputError(f"--set: {key}: not a key of the {type(config).__name__} of {self.script}. Remove it.")
            if (old := getattr(config, key)) not in (value, [value]):
                changes.append(f"{key} {_text(old)} -> {_text(value)}")
            setattr(config, key, value)
        if changes:
            _print(f"--set: {', '.join(changes)}")
        original(config)
        self.applied = {key: getattr(config, key) for key in self.settings}

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.has_trainer, owner = True, f"the {type(args).__name__} of {self.script}"
        self.refuse_unread(isinstance(args, DPOConfig))
        folder = Path(args.output_dir).resolve()
        if state.is_world_process_zero and folder not in self.folders:
            self.stack.enter_context(output_lock(args.output_dir))
            self.folders.add(folder)
        if self.settings and not isinstance(args, DPOConfig):
            _print(f"--set: not for {owner}, only for a DPOConfig or APOConfig.")
        for key, value in self.applied.items() if isinstance(args, DPOConfig) else ():
            if key != "padding_free" and (actual := getattr(args, key)) != value:  # that one is hidden from TRL
                fault = f"the script changes it to {_text(actual)} later"
                raise InputError(f"--set: {key}: not applied to {owner}, {fault}. Change the script.")
        given: dict[str, Any] = {}
        for option in self.argv.options():
            given |= _parse(option, type(args))
        for key, value in given.items():
            actual = getattr(args, key)
            comparable = isinstance(actual, type(value)) or (isinstance(value, float) and isinstance(actual, int))
            if comparable and actual != value and key not in ("padding_free", *self.settings):
                _print(f"{key}: {_text(value)} was given, {owner} has {_text(actual)}.")

    def refuse_unread(self, overridable: bool = True) -> None:
        """Raise InputError if the script has not read an argument."""
        read = self.argv.read | self.argv.copied
        unread = [option for option in self.argv.options() if option[0] not in read]
        names = list(dict.fromkeys(option[0].split("=")[0] for option in unread))
        settings: dict[str, Any] = {}
        for option in unread if overridable else []:
            values = _typed(option[1:]) if option[0] == "--set" else _parse(option, DPOConfig)
            settings |= {key: value for key, value in values.items() if "token" not in key}
        if settings:
            words = " ".join(shlex.quote(f"{key}={_text(value)}") for key, value in settings.items())
            command = f"`apo-trl run --set {words} {shlex.quote(self.argv[0])}`"
            remedy = f"set {', '.join(settings)} with {command}, or let the script build its DPOConfig with TrlParser"
            raise InputError(f"{self.script} does not read {' '.join(names)}: {remedy}.")
        if names:
            known = self.argv.known | {f"--{field.name}" for field in dataclasses.fields(DPOConfig)}
            hint = "" if names[0] in known else nearest(names[0], known)
            remedy = "Remove it, or let the script read it, with TrlParser for example"
            raise InputError(f"{self.script} does not read {' '.join(names)}.{hint} {remedy}.")

    def finish(self) -> None:
        """Raise InputError if the script has ended without a trainer or configuration to check."""
        if not self.has_trainer:
            self.refuse_unread()
        if self.settings and not self.applied:
            remedy = "Remove it, or build one in the script"
            raise InputError(f"--set: {self.script} has built no DPOConfig or APOConfig. {remedy}.")


class _Parser(HfArgumentParser):
    def __init__(self, config_class: Any) -> None:
        super().__init__(config_class, allow_abbrev=False, add_help=False, exit_on_error=False)
        for action in self._actions:
            action.default, action.required = argparse.SUPPRESS, False

    parse_known_args = argparse.ArgumentParser.parse_known_args  # not recorded


_parser = functools.cache(_Parser)


def _parse(option: Sequence[str], config_class: Any) -> dict[str, Any]:
    """Return the field of a configuration that an option sets, or nothing if the option is the script's own."""
    with contextlib.suppress(argparse.ArgumentError):
        return vars(_parser(config_class).parse_known_args(option)[0])
    return {}


def _typed(settings: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    known = [field.name for field in dataclasses.fields(APOConfig) if field.init]
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set: must be KEY=VALUE, got '{setting}'. Write for example --set beta=0.1.")
        if key not in known:
            raise InputError(f"--set: unknown key '{key}'.{nearest(key, known)} Set a key of DPOConfig.")
        try:
            items = yaml.safe_load(text) if text.startswith("[") else [text]
        except yaml.YAMLError as error:
            raise InputError(f"--set: {key}: {text!r} is no list. Write for example [apo_zero,sft].") from error
        try:
            values |= vars(_parser(APOConfig).parse_known_args([f"--{key}", *map(str, items)])[0])
        except argparse.ArgumentError as error:
            raise InputError(f"--set: {key}: {error.message}.") from error
    return values


def _text(value: Any) -> str:
    """Return a value as it is written after `--set key=`."""
    if isinstance(value, list):
        return _text(value[0]) if len(value) == 1 else f"[{','.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):
        return "unset" if value is None else str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _print(line: str) -> None:
    if is_local_main_process():
        print(line, file=sys.stderr)


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, function: Any) -> Iterator[None]:
    """Make a method of a class call `function(method, self, ...)`."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **settings: function(original, *args, **settings))
    try:
        yield
    finally:
        setattr(owner, name, original)
