"""The command line that gives a saved configuration again."""

import shlex

from ..config import TrainConfig
from ..errors import UserError
from ..presets import PRESETS

# Not flags: the tokenizer decides the vocabulary.
_DERIVED = ("vocab_size",)


def flags(config: dict, base: dict, skip: tuple[str, ...] = ()) -> list[str]:
    """Command-line flags that turn ``base`` into ``config`` (both as ``TrainConfig.to_dict()`` gives them)."""
    words = []
    for key, value in config.items():
        if isinstance(value, dict):
            words += flags(value, base.get(key, {}), skip)
        elif key not in _DERIVED + skip and _plain(value) != _plain(base.get(key)):
            name = "--" + key.replace("_", "-")
            if isinstance(value, bool):
                words.append(name if value else name.replace("--", "--no-", 1))
            elif isinstance(value, (list, tuple)):
                words += [name, *map(str, value)]
            else:
                words += [name, str(value)]
    return words


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def train_command(config: dict) -> str:
    """``depthmix train ...`` from the preset that needs the fewest flags."""
    candidates = [["depthmix", "train", "--preset", name, *flags(config, _dict(name))] for name in PRESETS]
    return shlex.join(min(candidates, key=len))


def compare_command(plan: dict) -> str:
    """``depthmix compare ...`` of a saved ``compare.json``."""
    words = ["depthmix", "compare", "--recipe", plan["recipe"], "--residuals", ",".join(plan["residuals"])]
    if plan["seeds"] != 1:
        words += ["--seeds", str(plan["seeds"])]
    try:
        base = _dict(plan["recipe"])
    except UserError:
        base = {}
    return shlex.join(words + flags(plan["config"], base, skip=("residual",)))


def _dict(name: str) -> dict:
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}")
    config: TrainConfig = PRESETS[name]
    return config.to_dict()
