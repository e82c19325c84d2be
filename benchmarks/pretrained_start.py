"""A trained language model with every connection: how far its logits and its loss are from what they were.

    python benchmarks/pretrained_start.py FOLDER TEXT --out results/pretrained-start.json

FOLDER is what ``scripts/unpack_smollm2.py`` writes (or any model that ``save_pretrained`` wrote), TEXT a text file,
perhaps ``.xz``. Needs the extra ``hf``. One pass over ``--tokens`` tokens for every connection and start, fp32, CPU.
"""

import argparse
import json
import lzma
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from depthmix import adapt, available_residuals
from depthmix.errors import UserError

MERGE = {"hc": "hc:merge=mean", "hc-static": "hc-static:merge=mean", "mhc": "mhc:merge=mean",
         "mhc-lite": "mhc-lite:merge=mean"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--n-streams", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    opened = lzma.open if arguments.text.suffix == ".xz" else open
    with opened(arguments.text, "rt", encoding="utf-8") as file:
        text = file.read(20 * arguments.tokens)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.folder, local_files_only=True)
    ids = torch.tensor([tokenizer(text)["input_ids"][: arguments.tokens]])

    def model():
        return transformers.AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def run(model):
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
        return logits, F.cross_entropy(logits[:-1], ids[0, 1:]).item()

    logits, loss = run(model())
    rows = []
    for name in available_residuals():
        row = {"residual": MERGE.get(name, name)}
        for start in ("prenorm", "prenorm-scaled", "own"):
            try:
                mixed = adapt(model(), row["residual"], n_streams=arguments.n_streams, start=start)
            except UserError as error:
                row[start] = {"refused": str(error)}
                continue
            found, its_loss = run(mixed)
            row[start] = {
                "largest_difference": (found - logits).abs().max().item() / logits.abs().max().item(),
                "loss": its_loss,
            }
            del mixed
        rows.append(row)
        print(name, {k: v if isinstance(v, str) else v.get("loss") for k, v in row.items()}, flush=True)
    result = {
        "model": arguments.folder.name,
        "tokens": ids.shape[1],
        "n_streams": arguments.n_streams,
        "loss": loss,
        "rows": rows,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
