"""Where weight files lie: ComfyUI's model folders, extendable by extra_model_paths.yaml."""
from __future__ import annotations

import os

import folder_paths

ADAPTER_FOLDER = "flexip"
ENCODER_FOLDER = "clip_vision"
AUTO = "auto"


def register_folders() -> None:
    """models/flexip; paths that extra_model_paths.yaml added before stay in front."""
    folder_paths.add_model_folder_path(ADAPTER_FOLDER, os.path.join(folder_paths.models_dir, ADAPTER_FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[ADAPTER_FOLDER]
    folder_paths.folder_names_and_paths[ADAPTER_FOLDER] = (paths, {".safetensors", ".sft"})


def names(folder: str) -> list[str]:
    return folder_paths.get_filename_list(folder)


def path_of(folder: str, name: str, node: str) -> str:
    """Full path of a listed file; a name that is not listed (a path out of the folder included) is refused."""
    path = folder_paths.get_full_path(folder, name) if name in names(folder) else None
    if path is None:
        raise ValueError(f"{node}: there is no file {name!r} in {searched(folder)}. Files found there: {', '.join(names(folder)) or 'none'}.")
    return path


def searched(folder: str) -> str:
    return " or ".join(folder_paths.get_folder_paths(folder))
