"""Node ids, input names, order, enum strings, defaults and outputs are frozen: saved workflows depend on them.

New inputs are optional and last. After such an addition, FLEXIP_UPDATE_SNAPSHOT=1 rewrites the snapshot; it refuses what would
break a workflow.
"""

import asyncio
import copy
import inspect
import json
import os
import subprocess
from pathlib import Path

import flexip_pack
import pytest
from flexip_pack.nodes import compat

SNAPSHOT = Path(__file__).with_name("schema_snapshot.json")
FILE_LISTS = {  # what the user's folders hold; of their options only the words of our own are kept
    "LoadFlexIPAdapters": {"preservation", "personalization", "clip_vision", "dino"},
    "FlexIPStart": {"preservation", "personalization", "clip_vision"},
    "FlexIPScore": {"clip_vision", "dino"},
    "FlexIPAutoGate": {"clip_vision", "dino"},
    "FlexIPLoadReference": {"reference_file"},
    "FlexIPTrain": {"checkpoint", "clip_vision", "dino", "data"},
}
CORE_LISTS = {"sampler_name", "scheduler"}  # core's to change
MENU = {f"FlexIP/{part}" for part in ("start", "control", "references", "check", "train")}
BREAKS = "this breaks saved workflows"


def node_classes():
    extension = asyncio.run(flexip_pack.comfy_entrypoint())
    return asyncio.run(extension.get_node_list())


def describe(node):
    schema = node.define_schema()
    inputs = []
    for i in schema.inputs:
        options = getattr(i, "options", None)
        if i.id in FILE_LISTS.get(schema.node_id, ()):
            options = [option for option in options or [] if option in ("auto", "none")]
            options = options if schema.node_id == "FlexIPTrain" else options or None  # as its first snapshot has it
        elif i.id in CORE_LISTS:
            options = None
        inputs.append(
            {
                "id": i.id,
                "type": i.get_io_type(),
                "optional": i.optional,
                "default": getattr(i, "default", None),
                "options": options,
                "min": getattr(i, "min", None),
                "max": getattr(i, "max", None),
                "step": getattr(i, "step", None),
            }
        )
    return {
        "inputs": inputs,
        "outputs": [{"id": o.id, "type": o.get_io_type()} for o in schema.outputs],
        "list": schema.is_input_list,
    }


def current():
    nodes = {node.define_schema().node_id: describe(node) for node in node_classes()}
    return json.loads(json.dumps(nodes))  # as the file holds it: tuples are lists there


def as_far_as_core_goes(nodes):
    """An older core cannot draw a curve: there the schedule lacks that preset, and the input it is drawn in."""
    schedule = nodes.get("FlexIPGateSchedule")
    if schedule and compat.CurveInput is None:
        schedule["inputs"] = [i for i in schedule["inputs"] if i["id"] != "curve"]
        schedule["inputs"][0]["options"].remove("curve")
    return nodes


def snapshot(text=None):
    return as_far_as_core_goes(json.loads(SNAPSHOT.read_text() if text is None else text))


def as_allowed(node_id, before, after):
    """`before` with what may change without breaking a workflow: a required input may become optional, and a list may get
    further words at its end; a list of the user's files, whose words are between theirs, anywhere."""
    if before["id"] != after["id"]:
        return before
    allowed, old, new = dict(before), before["options"] or [], after["options"] or []
    if after["optional"]:
        allowed["optional"] = True
    is_list = before["id"] in FILE_LISTS.get(node_id, ())
    if new[: len(old)] == old and (old or is_list) or is_list and set(old) <= set(new):
        allowed["options"] = after["options"]
    return allowed


def check_compatible(old, new):
    for node_id, before in old.items():
        assert node_id in new, f"node {node_id} is gone: {BREAKS}"
        after = new[node_id]
        assert after["outputs"][: len(before["outputs"])] == before["outputs"], (
            f"outputs of {node_id} changed: {BREAKS}"
        )
        assert after["list"] == before["list"], f"{node_id} takes lists differently: {BREAKS}"
        old = [as_allowed(node_id, *pair) for pair in zip(before["inputs"], after["inputs"])]
        old += before["inputs"][len(old) :]
        assert after["inputs"][: len(before["inputs"])] == old, f"inputs of {node_id} changed: {BREAKS}"
        for added in after["inputs"][len(before["inputs"]) :]:
            assert added["optional"], f"{node_id} has a new required input {added['id']}: {BREAKS}"


def test_schemas_equal_the_snapshot():
    new = current()
    check_compatible(snapshot(), new)
    if os.environ.get("FLEXIP_UPDATE_SNAPSHOT") and compat.CurveInput is not None:
        SNAPSHOT.write_text(json.dumps(new, indent=1) + "\n")
    assert new == snapshot(), "something was added: run this test with FLEXIP_UPDATE_SNAPSHOT=1 and commit the snapshot"


def test_every_snapshot_that_was_ever_committed_is_still_served():
    """Else an edited snapshot could hide that something broke (complaint 10: saved workflows stop loading)."""

    def git(*arguments):
        command = ["git", *arguments]
        return subprocess.run(command, cwd=SNAPSHOT.parent, capture_output=True, text=True, check=True).stdout

    try:
        commits = git("log", "--format=%H", "--diff-filter=AM", "--", SNAPSHOT.name).split()
        texts = [git("show", f"{commit}:./{SNAPSHOT.name}") for commit in commits]
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and the repository's history")
    for text in texts:
        check_compatible(snapshot(text), current())


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("EncodeReference"),
        lambda s: s["EncodeReference"]["inputs"].pop(2),
        lambda s: s["EncodeReference"]["inputs"].pop(),
        lambda s: s["EncodeReference"]["inputs"].reverse(),
        lambda s: s["FlexIPTrain"]["inputs"][2]["options"].remove("auto"),
        lambda s: s["EncodeReference"]["inputs"][2]["options"].remove("pad"),
        lambda s: s["ApplyFlexIPGate"]["inputs"][3].update(default=0.5),
        lambda s: s["FlexIPSampler"]["outputs"].pop(),
        lambda s: s["FlexIPSampler"]["inputs"].append({"id": "new", "optional": False}),
        lambda s: s["ApplyFlexIPGate"]["inputs"][4].update(id="weight", optional=True),
        lambda s: s["ApplyFlexIPGate"]["inputs"][1].update(type="MODEL", optional=True),
        lambda s: s["ApplyFlexIPGate"]["inputs"][7].update(optional=False),
        lambda s: s["EncodeReference"]["inputs"][2]["options"].insert(0, "new"),
        lambda s: s["EncodeReference"]["inputs"][2]["options"].insert(2, "new"),
        lambda s: s["EncodeReference"]["inputs"][2]["options"].reverse(),
        lambda s: s["EncodeReference"]["inputs"][2].update(options=None),
    ],
)
def test_every_breaking_change_is_noticed(change):
    old = current()
    new = copy.deepcopy(old)
    change(new)
    with pytest.raises(AssertionError, match=BREAKS):
        check_compatible(old, new)


def test_an_optional_input_at_the_end_is_allowed():
    new = current()
    new["FlexIPSampler"]["inputs"].append({"id": "new", "optional": True})
    check_compatible(current(), new)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["ApplyFlexIPGate"]["inputs"][2].update(optional=True),
        lambda s: s["EncodeReference"]["inputs"][2]["options"].append("new"),
        lambda s: s["LoadFlexIPAdapters"]["inputs"][1]["options"].append("none"),
    ],
)
def test_what_no_workflow_notices_is_allowed(change):
    new = current()
    change(new)
    check_compatible(current(), new)


def test_inputs_match_the_parameters_of_execute():
    for node in node_classes():
        parameters = list(inspect.signature(node.execute).parameters)
        if compat.CurveInput is None and "curve" in parameters:
            parameters.remove("curve")
        assert [i.id for i in node.define_schema().inputs] == parameters


def test_every_socket_has_a_tooltip_and_every_node_a_help_page():
    docs = Path(flexip_pack.__file__).parent / "web" / "docs"
    for node in node_classes():
        schema = node.define_schema()
        assert schema.description and schema.category in MENU and schema.search_aliases
        for socket in (*schema.inputs, *schema.outputs):
            assert socket.tooltip, f"{schema.node_id}.{socket.id}"
        page = (docs / f"{schema.node_id}.md").read_text()
        for i in schema.inputs:
            assert i.id in page or schema.node_id == "FlexIPSampler" and "everything else" in page, (
                f"{i.id} is missing on the help page of {schema.node_id}"
            )


def test_node_ids_do_not_collide_with_core():
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    ours = set(current())
    assert ours == {"LoadFlexIPAdapters", "EncodeReference", "ApplyFlexIPGate", "FlexIPSampler"} or all(
        node_id.startswith("FlexIP") for node_id in ours - {"LoadFlexIPAdapters", "EncodeReference", "ApplyFlexIPGate"}
    )
    assert not ours & set(nodes.NODE_CLASS_MAPPINGS)


def test_the_loaders_help_page_names_every_folder_of_adapters():
    from flexip_pack.nodes import files

    page = (Path(flexip_pack.__file__).parent / "web" / "docs" / "LoadFlexIPAdapters.md").read_text()
    for folder in (*files.ADAPTER_FOLDERS, files.ENCODER_FOLDER):
        assert f"`models/{folder}`" in page
