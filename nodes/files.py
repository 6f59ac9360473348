"""Where weight files lie: ComfyUI's model folders, extendable by extra_model_paths.yaml."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import folder_paths

from ..flexip_core.files.folders import any_system

ADAPTER_FOLDERS = ("flexip", "ipadapter")
ENCODER_FOLDER = "clip_vision"
AUTO = "auto"


def register_folders() -> None:
    """models/flexip and models/ipadapter; paths that extra_model_paths.yaml or another pack added before stay in front."""
    for folder in ADAPTER_FOLDERS:
        folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))
        paths, extensions = folder_paths.folder_names_and_paths[folder]
        if not extensions:  # as extra_model_paths.yaml leaves it; empty would list every file
            folder_paths.folder_names_and_paths[folder] = (paths, set(folder_paths.supported_pt_extensions))


def adapter_names() -> list[str]:
    """Files of both folders; a name in both means the first folder's."""
    return list(dict.fromkeys(name for folder in ADAPTER_FOLDERS for name in names(folder)))


def adapter_path(name: str, node: str) -> str:
    folder = next((folder for folder in ADAPTER_FOLDERS if same_name(name, names(folder))), None)
    if folder is None:
        where = " or ".join(map(searched, ADAPTER_FOLDERS))
        raise ValueError(
            f"{node}: there is no file {shown(name)} in {where}. Files found there: {listed(adapter_names())}."
        )
    return path_of(folder, name, node)


def names(folder: str) -> list[str]:
    return [name for name in folder_paths.get_filename_list(folder) if not any_system(name)]


def path_of(folder: str, name: str, node: str) -> str:
    """Full path of a listed file; a name that is not listed (a path out of the folder included) is refused."""
    listed_name = same_name(name, names(folder))
    path = folder_paths.get_full_path(folder, listed_name) if listed_name is not None else None
    if path is not None:
        return path
    for where in folder_paths.get_folder_paths(folder) if listed_name is not None else ():
        link = os.path.join(where, str(listed_name))
        if os.path.islink(link):
            raise ValueError(
                f"{node}: {shown(listed_name)} in {where} is a link that leads nowhere: {shown(os.readlink(link))} is missing. Bring "
                "that file back (a cache that was emptied, a drive that is not there), or put the file itself into the folder."
            )
    raise ValueError(
        f"{node}: there is no file {shown(name)} in {searched(folder)}. Files found there: {listed(names(folder))}."
    )


def same_name(name: str, found: Iterable[str]) -> str | None:
    """The listed name that is meant: as it is, or with the separators of the system on which the workflow was saved."""
    found = list(found)
    if name in found:
        return name
    plain = str(name).replace("\\", "/")
    return next((one for one in found if one.replace("\\", "/") == plain), None)


def check_choices(node: str, options: Mapping[str, Iterable[str]], choices: Mapping[str, Any]) -> bool | str:
    """For validate_inputs, in place of a combo's own check: just as strict, except for the separators.

    `options`: input -> what it lists; `choices`: input -> what came, None over a wire.
    """
    for name, choice in choices.items():
        found = list(options[name])
        if choice is not None and same_name(choice, found) is None:
            return f"{node}: {name} is {shown(choice)}, which is not there. Choose one of these: {listed(found)}."
    return True


def state_of(folder: str) -> list[tuple[str, int, int]]:
    """Name, time and size of every file, for ComfyUI's cache: whoever looks a file up by its contents depends on all of them.

    Never raises: a folder or a file that cannot be read is left out, and running the node says what is wrong.
    """
    try:
        paths = {name: folder_paths.get_full_path(folder, name) for name in names(folder)}
    except OSError:  # a folder that ComfyUI remembers is gone
        return []
    found = []
    for name, path in paths.items():
        with suppress(OSError, TypeError):  # gone in between, or a link that leads nowhere, which has no path
            status = os.stat(path)
            found.append((name, status.st_mtime_ns, status.st_size))
    return found


def searched(folder: str) -> str:
    return " or ".join(folder_paths.get_folder_paths(folder))


def shown(name: object) -> str:
    """A name from a prompt for messages: in quotes, not too long."""
    return repr(name) if len(str(name)) <= 200 else repr(str(name)[:200] + "...")


def listed(found: list[str]) -> str:
    return (", ".join(found[:20]) + (f", and {len(found) - 20} more" if len(found) > 20 else "")) or "none"
