"""Where files are: those that come with the package, and the folder of a checkpoint. Imports no other module."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def bundled(name: str) -> Path:
    """A file or folder that comes with the package, such as "launch/configs/small_moe.yaml".

    A checkout has them at its top, beside the package; a wheel has them inside the package, in `data` (setup.py).
    """
    installed = PACKAGE / "data"
    return (installed if installed.is_dir() else PACKAGE.parent) / name


def checkpoint_folder(name: str) -> Path:
    """The folder that `--model` names: by its path, or as a model of the Hugging Face Hub that was downloaded before.

    Nothing is downloaded.

    Raises:
        FileNotFoundError: there is no such folder, nor such a model in the Hub's local cache.
        ImportError: the name could be a model of the Hub, but huggingface_hub is not installed.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"--model {name}: expected the folder of a checkpoint, there is none")
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:
        raise ImportError(
            f"--model {name}: there is no such folder; models of the Hugging Face Hub need the package huggingface_hub"
        ) from None
    config = try_to_load_from_cache(name, "config.json")
    if isinstance(config, str):
        return Path(config).parent
    raise FileNotFoundError(
        f"--model {name}: there is no such folder, and no such model in the Hub's local cache "
        f"({constants.HF_HUB_CACHE}): download it first (hf download {name}), or name a folder"
    )
