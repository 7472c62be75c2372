"""Run the rounds: one process for each stage, a marker at its end, and what only earlier rounds needed removed."""

import json
import random
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from apo_trl.errors import InputError
from apo_trl.io.files import atomic_write, read_json, write_json
from apo_trl.io.readers import read_rows
from apo_trl.io.resources import packaged
from apo_trl.models.merge import DTYPES
from apo_trl.models.packaged import resolve_model
from apo_trl.pairs.build import check_inputs
from apo_trl.pairs.config.settings import make_settings
from apo_trl.rounds.page import failed_requests, write_page
from apo_trl.rounds.processes import Server, run_command
from apo_trl.rounds.settings import Settings, keep_settings
from apo_trl.training.lock import output_lock

__all__ = ["check", "run_rounds"]


def run_rounds(settings: Settings) -> Path:
    """Run all rounds, or resume, and return the path of the page over them.

    A later round of which no pair is kept ends the run: the policy's answers leave nothing to train on.

    Raises:
        InputError: Settings are invalid or have changed, a command failed, or another run uses the folder.
    """
    folder = Path(settings.output_dir)
    with output_lock(folder):
        keep_settings(settings, folder)
        check(settings)
        run = _Rounds(settings, folder)
        try:
            last = run.all()
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(" Run the same command again to resume.") from error
        finally:
            run.stop()
        return write_page(folder, last)


def check(settings: Settings) -> None:
    """Check the sections of keys before the first process starts."""
    policy = {"policy_model": settings.model_name_or_path, "output_dir": settings.output_dir}
    for section, values in (("pairs", settings.pairs), ("score", settings.score | {"method": "on_policy_judge"})):
        try:
            check_inputs(make_settings(values | policy))
        except InputError as error:
            raise InputError(f"{section}.{error}") from error
    from apo_trl.training.arguments import parse

    path = Path(settings.output_dir, "train.yaml")
    values = settings.train | {"model_name_or_path": settings.model_name_or_path, "output_dir": settings.output_dir}
    _write_yaml(path, values)
    try:
        parse(["--config", str(path), "--use_cpu"])  # not to take memory of a GPU
    finally:
        path.unlink()


class _Rounds:
    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self._server: Server | None = None
        if settings.policy_serve is not None:
            self._server = Server(settings.policy_serve, settings.policy_serve_timeout, folder / "serve.log")
        self._stages = ["pairs", "train", *["merge"] * settings.merges, "score"]  # of a round
        self._left = ["score", *self._stages * settings.rounds]
        self._seconds: dict[str, float] = {}  # of the last run of each stage

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()

    def all(self) -> int:
        """Run every stage, and return the number of the last round with pairs."""
        for number in range(self.settings.rounds + 1):
            self._folder(number).mkdir(exist_ok=True)
            for name in self._stages if number else ["score"]:
                try:
                    self._stage(number, name)
                except InputError:
                    if number < 2 or name != "pairs" or not (dropped := self._dropped_all(number)):
                        raise
                    print(f"  No pair was kept ({dropped}): nothing to train on. The run ends with round {number - 1}.")
                    return number - 1
            self._tidy(number)
        return self.settings.rounds

    def _dropped_all(self, number: int) -> str:
        """Return the counts of dropped rows by reason if a round has answers but no pairs, else an empty string."""
        report = read_json(self._folder(number) / "pairs" / "report.json")
        if not isinstance(report, dict) or report["kept"] or not report["complete"]:
            return ""
        return ", ".join(f"{count:,} {name}" for name, count in report["dropped"].items())

    def _folder(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def _model(self, number: int) -> str:
        """Return the model that answers at the end of a round."""
        if not number:
            return self.settings.model_name_or_path
        return str(self._folder(number) / ("merged" if self.settings.merges else "policy"))

    def _trained(self, number: int) -> str:
        """Return the model or adapter that the next round trains."""
        goes_on = number and self.settings.adapter == "continue"
        return str(self._folder(number) / "policy") if goes_on else self._model(number)

    def _stage(self, number: int, name: str) -> None:
        folder, field = self._folder(number), f"round {number}, {name}"
        marker = folder / f"{name}.json"
        done = read_json(marker)
        if is_new := done is None:
            keep_settings(self.settings, self.folder)  # a function may have been edited during the last stage
            print(f"Round {number} of {self.settings.rounds}: {name} ...", flush=True)
            started = time.monotonic()
            self._run(number, name, field)
            done = {"seconds": round(time.monotonic() - started, 1)}
            write_json(marker, done)
        self._left.remove(name)
        self._seconds[name] = done["seconds"]
        if is_new:
            print(f"  {timedelta(seconds=round(done['seconds']))}{self._time_left()}", flush=True)
        if name == "train":
            for checkpoint in (folder / "policy").glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

    def _run(self, number: int, name: str, field: str) -> None:
        """Run the command of a stage, and again if requests failed; rows whose requests fail twice are left out."""
        arguments, folder = getattr(self, f"_{name}")(number), self._folder(number)
        log = folder / f"{name}.log"
        run_command(arguments, log, field)
        if name == "pairs" and (stopped := read_json(folder / "pairs" / "report.json")["stopped"]):
            raise InputError(f"{field}: {stopped} See {log}, and run the same command again.")
        if name in ("pairs", "score") and failed_requests(folder, name):
            run_command(arguments, log, field)
            if failed := failed_requests(folder, name):
                print(f"  {failed:,} rows are left out: their requests failed twice. See {log}.", flush=True)

    def _time_left(self) -> str:
        if not self._left or not self._seconds.keys() >= {*self._left}:
            return ""
        return f"; about {timedelta(seconds=round(sum(self._seconds[name] for name in self._left)))} left"

    def _policy(self, number: int) -> dict[str, str]:
        model = resolve_model(self._model(number))  # a server does not know the name of the packaged one
        server = {} if self._server is None else {"policy_base_url": self._server.url(model)}
        return {"policy_model": model} | server

    def _pairs(self, number: int) -> list[str]:
        settings, folder = self.settings, self._folder(number)
        values = settings.pairs | {"output_dir": str(folder / "pairs"), "seed": settings.seed + number}
        if settings.prompts_per_round is not None:
            values["prompts"] = str(self._prompts(number, settings.prompts_per_round))
        values |= self._policy(number - 1)
        _write_yaml(folder / "pairs.yaml", values)
        return ["pairs", "build", str(folder / "pairs.yaml")]

    def _prompts(self, number: int, count: int) -> Path:
        """Write the prompts of a round: the next ones of all, in a random order, and again from the first."""
        name = str(self.settings.pairs["prompts"])
        rows = list(read_rows(str(packaged(name) or name), str(self.settings.pairs.get("prompts_split", "train"))))
        random.Random(self.settings.seed).shuffle(rows)
        first = (number - 1) * count
        chosen = [rows[index % len(rows)] for index in range(first, first + min(count, len(rows)))]
        path = self._folder(number) / "prompts.jsonl"
        with atomic_write(path) as beside:
            beside.write_text("".join(json.dumps(row, default=str) + "\n" for row in chosen), encoding="utf-8")
        return path

    def _train(self, number: int) -> list[str]:
        self.stop()  # the memory is the training's
        settings, folder = self.settings, self._folder(number)
        values = settings.train | {
            "model_name_or_path": self._trained(number - 1),
            "dataset_name": str(folder / "pairs"),
            "output_dir": str(folder / "policy"),
            "resume_from_checkpoint": True,
        }
        if settings.reference == "first_model" and number > 1:
            values["ref_model_name_or_path"] = settings.model_name_or_path
        _write_yaml(folder / "train.yaml", values)
        return ["train", str(folder / "train.yaml")]

    def _merge(self, number: int) -> list[str]:
        folder, dtype = self._folder(number), str(self.settings.train.get("dtype", "float32"))
        shutil.rmtree(folder / "merged", ignore_errors=True)  # of a run that was killed before the marker
        arguments = ["merge", str(folder / "policy"), "--output_dir", str(folder / "merged")]
        return arguments + (["--dtype", dtype] if dtype in DTYPES else [])  # not below what training computes in

    def _score(self, number: int) -> list[str]:
        values = self.settings.score | {"output_dir": str(self._folder(number) / "score")} | self._policy(number)
        values["model"] = values.pop("policy_model")
        words = ["score"]
        for key, value in values.items():
            texts = [value if isinstance(value, str) else json.dumps(value)] if not isinstance(value, list) else value
            words += [f"--{key}", *map(str, texts)]
        return words

    def _tidy(self, number: int) -> None:
        """Remove weights that no later round reads; logs and pairs stay."""
        merged_in = self.settings.adapter == "merge" and self.settings.merges
        for other in range(1, number + 1):
            folder, is_last = self._folder(other), other == number
            if not is_last and (self.settings.keep == "last" or self.settings.adapter == "continue"):
                shutil.rmtree(folder / "merged", ignore_errors=True)
            if self.settings.keep == "last" and (merged_in or not is_last):
                for pattern in ("*.safetensors", "*.bin", "*.safetensors.index.json"):
                    for path in (folder / "policy").glob(pattern):
                        path.unlink()


def _write_yaml(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as beside:
        beside.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
