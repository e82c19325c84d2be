"""Small runs, exported: every weight is drawn anew, so that no gate stands where it begins."""

import warnings

import pytest
import torch

from depthmix import GPT, GPTConfig
from depthmix.checkpoint import save_weights, write_json
from depthmix.config import DataConfig, TrainConfig
from depthmix.data.tokenizers import load_tokenizer, train_bpe
from depthmix.exchange.folder import export

SEQ_LEN = 48


def make_run(folder, residual, *, tokenizer="byte", dtype=torch.float32, n_layer=4, **model):
    """A run folder with one checkpoint of weights."""
    if tokenizer.startswith("bpe"):
        text = ["".join(f"line {i}: {i * i % 97} {'ab' * (i % 7)} aaaaaaa\n" for i in range(300))]
        spoken = train_bpe(int(tokenizer[4:]), text)
    else:
        spoken = load_tokenizer(tokenizer)
    config = TrainConfig(
        model=GPTConfig(
            -(-spoken.vocab_size // 64) * 64, n_layer, 32, 2, SEQ_LEN, residual=residual, **model
        ),
        data=DataConfig(tokenizer=spoken.name),
        steps=10,
        batch_size=4,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gpt = GPT(config.model, seed=0)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: (tensor + 0.2 * torch.randn(tensor.shape, generator=generator)).to(dtype)
        for name, tensor in gpt.state_dict().items()
    }
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.to_dict())
    write_json(folder / "tokenizer.json", spoken.to_dict())
    save_weights(folder / "checkpoints", 7, weights, {"config": config.to_dict()})
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """``exported(residual, **options) -> (run, folder)``, each made once; the folders hold their own code too."""
    made, home = {}, tmp_path_factory.mktemp("exported")

    def get(residual, **options):
        key = (residual, *sorted(options.items()))
        if key not in made:
            run = make_run(home / f"run-{len(made)}", residual, **options)
            folder = home / f"hf-{len(made)}"
            export(run, folder, standalone=True)
            made[key] = run, folder
        return made[key]

    return get
