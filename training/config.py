"""One training run as plain data: every option once, with its help, checked before any work.

The command line is made from these fields, a run's folder holds them as YAML, and a checkpoint
carries them, so that each of the three can start the same run again.
"""

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from ..engine.plan import parse_memory
from ..models import PRESETS, UResNetConfig

AUTO = "auto"


def _option(default: Any, help: str, **limits: float) -> Any:
    """A field with its default, its help, and its limits: `least` and `above`, both optional."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a training run computes.

    Raises ValueError, naming the option, the wanted and the given, for a value of another type or
    outside its limits, and for options that contradict each other.
    """

    data: str | None = _option(None, "Event file (HDF5) to train on.")
    synthetic: bool = _option(False, "Train on generated events instead of a file.")
    events: int = _option(64, "How many different events --synthetic generates.", least=1)
    val_data: str | None = _option(None, "Event file to validate on.")
    val_split: float = _option(
        0.0, "Share of the events, from the end, held out for validation.", least=0
    )
    image_size: str = _option("1260x2048", "Rows x columns of a plane.")
    clip_charge: float | None = _option(None, "Largest charge; larger ones are cut to it.", above=0)
    log_charge: bool = _option(True, "Train on log(1 + charge).")
    flip: bool = _option(False, "Mirror events at random in wire and in time.")

    model: Literal["uresnet"] = _option("uresnet", "Network.")
    preset: str = _option("uresnet", "The network's preset: uresnet, a21, polaris or scc21.")
    network: str = _option("", "Numbers other than the preset's, such as filters=4,depth=3.")
    policy: Literal["none", "keep", "closing", "series"] = _option(
        "none", "What fused segments keep for backward; none: torch's own layers compute."
    )
    loss: Literal["focal", "light", "even", "none", "lin"] = _option(
        "focal", "How pixels are weighted in the loss."
    )
    sync_batch_norm: bool = _option(False, "Batch statistics over all processes.")

    memory: str | None = _option(
        None,
        "Plan each step for this budget, such as 40GiB; auto: what each process' device has free.",
    )
    host_memory: str = _option(
        "0", "Pinned memory of the host that --memory's plan may let stored maps wait in."
    )
    split_batch: bool = _option(
        False,
        "Let --memory's plan run a few images at a time, where no normalisation is by the batch.",
    )
    batch_size: int | Literal["auto"] = _option(
        1,
        "Images per process and forward pass; auto: as many as --memory suffices for.",
        least=1,
    )
    accumulate: int = _option(1, "Forward passes per optimizer step.", least=1)
    steps: int | None = _option(None, "Optimizer steps; or give --epochs.", least=1)
    epochs: int | None = _option(None, "Passes over the events [default: 1].", least=1)
    optimizer: Literal["adamw", "adam", "sgd"] = _option("adamw", "Optimizer.")
    lr: float = _option(1e-3, "Learning rate.", above=0)
    weight_decay: float = _option(1e-2, "Weight decay.", least=0)
    schedule: Literal["constant", "cosine"] = _option(
        "constant", "Learning rate after the warm-up: kept, or a cosine's fall to zero."
    )
    warmup: int = _option(0, "Optimizer steps in which the learning rate rises.", least=0)

    precision: Literal["fp32", "bf16", "fp16", "fp64"] = _option(
        "fp32", "Compute type; bf16 and fp16 are mixed precision with float32 weights."
    )
    device: Literal["auto", "cpu", "gpu"] = _option("auto", "Where to run.")
    channels_last: bool = _option(True, "Keep activations NHWC in memory.")
    deterministic: bool = _option(False, "The same bits on every run, at some cost in speed.")
    workers: int = _option(2, "Processes that read events ahead, for each process.", least=0)
    seed: int = _option(0, "Seed of initial weights, order of events and flips.", least=0)

    validate_every: int = _option(
        0, "Optimizer steps between validations; 0: at the end only.", least=0
    )
    validate_first: bool = _option(False, "Validate the untrained network too.")
    checkpoint_every: int = _option(100, "Optimizer steps between checkpoints.", least=1)
    out: str = _option("run", "Folder of the run: checkpoints, curves, configuration.")

    def __post_init__(self):
        """Check every option, and what they say together."""
        hints = typing.get_type_hints(type(self))
        for option in dataclasses.fields(self):
            value = _coerce(option.name, hints[option.name], getattr(self, option.name))
            _check_limits(option, value)
            object.__setattr__(self, option.name, value)
        if self.synthetic == (self.data is not None):
            given = f"data={self.data!r} and synthetic={self.synthetic}"
            raise ValueError(f"want data, the path of an event file, or synthetic; got {given}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"want steps or epochs, not both; got steps={self.steps}, epochs={self.epochs}"
            )
        if self.val_split >= 1:
            raise ValueError(f"want val_split in [0, 1); got {self.val_split}")
        if self.val_split > 0 and self.val_data is not None:
            raise ValueError("want val_split or val_data, not both; got both")
        host = parse_memory(self.host_memory, "host_memory")
        if self.memory is not None:
            self._check_memory()
        elif self.batch_size == AUTO:
            raise ValueError("want memory beside batch_size auto; got none")
        elif host:
            raise ValueError(f"want memory beside host_memory {self.host_memory!r}; got none")
        elif self.split_batch:
            raise ValueError("want memory beside split_batch; got none")
        _ = self.size

    def _check_memory(self) -> None:
        """Refuse a budget that is none, and what cannot be planned for one."""
        if self.memory != AUTO:
            parse_memory(self.memory, "memory")
        if self.policy != "none":
            given = f"policy={self.policy!r} and memory={self.memory!r}"
            raise ValueError(f"want policy or memory, not both; got {given}")
        if self.precision == "fp64":
            raise ValueError("want precision fp32, bf16 or fp16 beside memory; got 'fp64'")

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a plane."""
        return parse_size(self.image_size)

    def total_steps(self, events: int, processes: int) -> int:
        """Return the optimizer steps of the run over that many events and processes."""
        if self.steps is not None:
            return self.steps
        return math.ceil(
            (self.epochs or 1) * events / (self.batch_size * self.accumulate * processes)
        )

    @classmethod
    def from_dict(cls, options: dict[str, Any], source: str = "configuration") -> Self:
        """Return the configuration of these options; ValueError names an unknown one and source."""
        known = {option.name for option in dataclasses.fields(cls)}
        if unknown := sorted(map(str, set(options) - known)):
            wanted = ", ".join(sorted(known))
            raise ValueError(f"{source}: unknown option {', '.join(unknown)}; known are {wanted}")
        try:
            return cls(**options)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def read_options(cls, path: str | Path) -> dict[str, Any]:
        """Return the options that a YAML file names, unchecked; ValueError if it is no mapping."""
        try:
            options = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: not a readable YAML file: {error}") from None
        if not isinstance(options, dict):
            raise ValueError(f"{path}: want options as `name: value`; got {type(options).__name__}")
        return options

    def as_dict(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return dataclasses.asdict(self)

    def write(self, path: Path) -> None:
        """Write all options as YAML, each below its help."""
        lines = ["# fullres train --config THIS_FILE runs this again."]
        for option in dataclasses.fields(self):
            lines.append(f"# {option.metadata['help']}")
            lines.append(yaml.safe_dump({option.name: getattr(self, option.name)}).strip())
        path.write_text("\n".join(lines) + "\n")


def parse_size(text: str) -> tuple[int, int]:
    """Return (rows, columns) of "ROWSxCOLUMNS"; ValueError for anything else."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ValueError(f"want image_size as ROWSxCOLUMNS, such as 1260x2048; got {text!r}")
    return int(found[1]), int(found[2])


def parse_network(preset: str, numbers: str = "") -> UResNetConfig:
    """Return a preset's numbers, those changed that `numbers` names, as in "filters=4,depth=3".

    Raises ValueError for an unknown preset, a number that the network does not have, or its range.
    """
    if preset not in PRESETS:
        raise ValueError(f"want preset from {', '.join(PRESETS)}; got {preset!r}")
    known = {option.name: option.type for option in dataclasses.fields(UResNetConfig)}
    changes = {}
    for part in filter(None, numbers.split(",")):
        name, _, value = (text.strip() for text in part.partition("="))
        if name not in known:
            raise ValueError(f"want in network one of {', '.join(known)}; got {part!r}")
        try:
            kinds = {bool: _truth, int: int}
            changes[name] = kinds.get(known[name], str)(value)
        except (ValueError, KeyError):
            raise ValueError(f"want in network {name}=VALUE; got {part!r}") from None
    return dataclasses.replace(PRESETS[preset], **changes)


def _truth(text: str) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[
        text.lower()
    ]


def _coerce(name: str, hint: Any, value: Any) -> Any:
    """Return value as the hinted type; ValueError if it is of another kind."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
        if value is None and len(parts) < len(typing.get_args(hint)):
            return None
        for part in parts[:-1]:
            try:
                return _coerce(name, part, value)
            except ValueError:
                continue
        if len(parts) > 1:
            return _coerce_word(name, parts, value)
        (hint,) = parts
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        raise ValueError(f"want {name} from {', '.join(choices)}; got {value!r}")
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML reads 1e-3, without a dot, as text
        except ValueError:
            pass
    if hint is str and isinstance(value, Path):
        value = str(value)
    if type(value) is not hint:
        raise ValueError(f"want {name} as {hint.__name__}; got {value!r}")
    return value


def _coerce_word(name: str, parts: list[Any], value: Any) -> Any:
    """Return a number, also as text, or one of a few words."""
    number, words = parts[0], typing.get_args(parts[1])
    if value in words:
        return value
    try:
        if isinstance(value, str):
            return number(value)
    except ValueError:
        pass
    wanted = f"{number.__name__} or {' or '.join(words)}"
    raise ValueError(f"want {name} as {wanted}; got {value!r}")


def _check_limits(option: dataclasses.Field, value: Any) -> None:
    if value is None or isinstance(value, str):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"want {option.name} finite; got {value}")
    if "least" in option.metadata and value < option.metadata["least"]:
        raise ValueError(f"want {option.name} >= {option.metadata['least']}; got {value}")
    if "above" in option.metadata and value <= option.metadata["above"]:
        raise ValueError(f"want {option.name} > {option.metadata['above']}; got {value}")
