"""The command line that gives a saved configuration again."""

import shlex

from ..config import TrainConfig, residual_label
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
    model = dict(config["model"])
    # The options of a connection are written into its name.
    model["residual"] = residual_label(model)
    model.pop("residual_options", None)
    config = {**config, "model": model}
    candidates = [["depthmix", "train", "--preset", name, *flags(config, _dict(name))] for name in PRESETS]
    shortest = min(candidates, key=len)
    return shlex.join(shortest)


def compare_command(plan: dict) -> str:
    """``depthmix compare ...`` of a saved ``compare.json``."""
    words = ["depthmix", "compare", "--recipe", plan["recipe"], "--residuals", ",".join(plan["residuals"])]
    if plan["seeds"] != 1:
        words += ["--seeds", str(plan["seeds"])]
    if plan.get("match_params"):
        words.append("--match-params")
    try:
        base = _dict(plan["recipe"])
    except UserError:
        base = {}
    return shlex.join(words + flags(plan["config"], base, skip=("residual", "residual_options")))


def depth_sweep_command(plan: dict) -> str:
    """``depthmix depth-sweep ...`` of a saved plan or ``depth.json``."""
    words = ["depthmix", "depth-sweep", "--residuals", ",".join(plan["residuals"])]
    words += ["--sublayers", ",".join(map(str, plan["sublayers"]))]
    if plan["seeds"] != 1:
        words += ["--seeds", str(plan["seeds"])]
    skip = ("residual", "residual_options", "n_layer")
    return shlex.join(words + flags(plan["config"], _dict("depth"), skip=skip))


def _dict(name: str) -> dict:
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}")
    config: TrainConfig = PRESETS[name]
    return config.to_dict()
