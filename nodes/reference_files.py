"""FlexIPSaveReference and FlexIPLoadReference: an encoded reference as a file in ComfyUI's output and input folders."""

from __future__ import annotations

import errno
import os
from typing import Any

import folder_paths
from comfy_api.v0_0_2 import io, ui

from ..flexip_core.files.folders import any_system
from ..flexip_core.files.names import is_device
from ..flexip_core.files.reference_file import SUFFIX, load_reference, save_reference
from ..flexip_core.run.reference import Reference
from . import files, notices
from .compat import is_within_directory
from .errors import named
from .types import REFERENCES_MENU, FlexIPReference

SAVE = "FlexIPSaveReference"
LOAD = "FlexIPLoadReference"


class FlexIPSaveReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=SAVE,
            display_name="Save FlexIP Reference",
            category=REFERENCES_MENU,
            description="Saves an encoded reference as a file, to use or share a subject without its picture. The file is not anonymous: much of the picture can be reconstructed from it.",
            search_aliases=["save reference", "save embeds", "ip-adapter save", "character", "export reference"],
            inputs=[
                FlexIPReference.Input(
                    "reference",
                    tooltip="From Encode Reference. References that are combined are saved one by one and combined after loading.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="flexip/reference",
                    tooltip="Sub-folder and beginning of the name in ComfyUI's output folder; a number is added, nothing is overwritten. %year% and %month% work as in Save Image.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, reference: Reference, filename_prefix: str) -> io.NodeOutput:
        if not isinstance(reference, Reference):
            raise ValueError(
                f"{SAVE}: expected one reference as it comes from Encode Reference, got a combination of references. "
                "Save each of them, and combine them after loading."
            )
        try:
            folder, subfolder, file = _new_file(filename_prefix)
            path = os.path.join(folder, file)
            with named(SAVE):
                save_reference(reference, path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise ValueError(
                    f"{SAVE}: filename_prefix is too long for a file's name. Use a shorter one, like flexip/reference."
                ) from None
            raise RuntimeError(
                f"{SAVE}: the reference could not be written to ComfyUI's output folder ({error.strerror or error}). Check its space and permissions."
            ) from None
        text = (
            f"saved in the output folder as {_shown(os.path.join(subfolder, file))}: "
            f"{reference.count} picture(s), {os.path.getsize(path) / 1e6:.1f} MB, {reference.encoders}"
        )
        said = notices.said(text)
        return io.NodeOutput(ui={**said, "files": [ui.SavedResult(file, subfolder, io.FolderType.output)]})


class FlexIPLoadReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=LOAD,
            display_name="Load FlexIP Reference",
            category=REFERENCES_MENU,
            description="Loads a reference that Save FlexIP Reference wrote. Neither the picture nor the image encoders are needed.",
            search_aliases=["load reference", "load embeds", "ip-adapter load", "character", "import reference"],
            inputs=[
                io.Combo.Input(
                    "reference_file",
                    options=reference_names(),
                    tooltip=f"Files whose names end with {SUFFIX}, in ComfyUI's input folder, or in the output folder (marked [output]).",
                )
            ],
            outputs=[
                FlexIPReference.Output(
                    "reference",
                    display_name="reference",
                    tooltip="The encoded reference; wire it into Apply FlexIP Gate with adapters that read the same encoders.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, reference_file: str | None = None) -> bool | str:
        """In place of the combo's own check, so that a file saved a moment ago is found."""
        if reference_file is None:  # comes over a wire, or is missing, which ComfyUI says itself
            return True
        try:
            reference_path(reference_file)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, reference_file: str | None) -> int | None:
        return None if reference_file is None else os.stat(reference_path(reference_file)).st_mtime_ns

    @classmethod
    def execute(cls, reference_file: str) -> io.NodeOutput:
        path = reference_path(reference_file)
        with named(LOAD):
            return io.NodeOutput(load_reference(path))


def reference_names() -> list[str]:
    """What the combo lists: names in the input folder as they are, in the output folder with ComfyUI's mark."""
    output = [f"{name} [output]" for name in _files_in(folder_paths.get_output_directory())]
    return [*_files_in(folder_paths.get_input_directory()), *output]


def reference_path(name: Any) -> str:
    """Full path for a name as the combo lists it; ValueError in one sentence for a missing file or one outside ComfyUI's folders."""
    # not get_annotated_filepath, which looks at nothing on older cores
    file, folder = folder_paths.annotated_filepath(str(name))
    folder = folder or folder_paths.get_input_directory()
    path = os.path.abspath(os.path.join(folder, file))
    if os.sep == "/" and not os.path.isfile(
        path
    ):  # a workflow that was saved on Windows; Windows itself takes both separators
        path = os.path.abspath(os.path.join(folder, file.replace("\\", "/")))
    if not is_within_directory(folder, path):
        raise ValueError(
            f"{LOAD}: {files.shown(name)} lies outside ComfyUI's input and output folders. Copy the file into the input folder."
        )
    if not os.path.isfile(path):
        found = files.listed(reference_names())
        raise ValueError(
            f"{LOAD}: there is no file {files.shown(name)}. Reference files in the input and output folders: {found}."
        )
    return path


def _new_file(prefix: str) -> tuple[str, str, str]:
    """Folder, sub-folder and a new name in ComfyUI's output folder, numbered as Save Image numbers."""
    output = folder_paths.get_output_directory()
    if any(letter < " " or "\ud800" <= letter <= "\udfff" for letter in prefix):
        raise ValueError(
            f"{SAVE}: filename_prefix {files.shown(prefix)} holds characters that no file name can have. Use a name like flexip/reference."
        )
    folder = os.path.join(output, os.path.dirname(os.path.normpath(prefix)))
    if not is_within_directory(output, folder):
        raise ValueError(
            f"{SAVE}: filename_prefix {files.shown(prefix)} leads out of ComfyUI's output folder. Use a name or a sub-folder, like flexip/reference."
        )
    if is_device(prefix):
        raise ValueError(
            f"{SAVE}: filename_prefix {files.shown(prefix)} holds a name that Windows keeps for a device. Use a name like flexip/reference."
        )
    if not os.path.basename(prefix).strip(". "):
        raise ValueError(
            f"{SAVE}: filename_prefix {files.shown(prefix)} ends without a name for the file. Use a name like flexip/reference."
        )
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
    return folder, subfolder, f"{name}_{counter:05}_{SUFFIX}"


def _files_in(folder: str) -> list[str]:
    """Reference files under `folder`, sorted; walking past 50,000 pictures takes some 25 ms."""
    paths = [
        os.path.join(where, file)
        for where, _, found in os.walk(folder)  # follows no links: what lies behind them could not be loaded
        for file in found
        if file.endswith(SUFFIX)
    ]
    names = (_shown(os.path.relpath(path, folder)) for path in paths if is_within_directory(folder, path))
    return sorted(name for name in names if not any_system(name))


def _shown(path: str) -> str:
    """With the same separator on every system, so that a workflow can be shared."""
    return path.replace(os.sep, "/")
