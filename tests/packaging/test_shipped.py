"""Every workflow that was ever shipped stays a test case (complaint 10: saved workflows stop loading).

tests/server/test_templates.py runs and opens what lies in tests/fixtures/shipped_workflows. When a template is changed,
the old one stays there, and the new one goes into a folder of its own, named after the version that ships it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SHIPPED = REPO / "tests" / "fixtures" / "shipped_workflows"
LAYOUT = {"pos", "size", "order", "flags", "color", "bgcolor", "title"}  # of a node; no version can break on these
NOTES = ("MarkdownNote", "Note")


def matter(text: str) -> str:
    """What another version of the pack could fail at: nodes, widgets, sockets and links, not where they lie."""
    workflow = json.loads(text)
    nodes = [
        {key: value for key, value in node.items() if key not in LAYOUT}
        for node in workflow["nodes"]
        if node["type"] not in NOTES
    ]
    nodes.sort(key=lambda node: node["id"])
    subgraphs = workflow.get("definitions", {})
    return json.dumps([nodes, sorted(workflow["links"]), subgraphs], sort_keys=True)


def kept() -> set[tuple[str, str]]:
    return {(path.name, matter(path.read_text(encoding="utf-8"))) for path in SHIPPED.rglob("*.json")}


def git(*arguments: str) -> str:
    command = ["git", "-C", str(REPO), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and the repository's history")
    return done.stdout


def history(path: str) -> list[tuple[str, str]]:
    """(commit, file) of everything below `path` that a commit added or changed."""
    found, commit = [], ""
    for line in git("log", "--format=commit %H", "--diff-filter=AM", "--name-only", "--no-renames", "--", path).split(
        "\n"
    ):
        if line.startswith("commit "):
            commit = line.removeprefix("commit ")
        elif line:
            found.append((commit, line))
    return found


def test_every_template_is_kept_as_it_is_shipped_now() -> None:
    have = kept()
    for path in (REPO / "workflows").glob("*.json"):
        assert (path.name, matter(path.read_text(encoding="utf-8"))) in have, (
            f"copy workflows/{path.name} into tests/fixtures/shipped_workflows, next to what was shipped before"
        )


def test_every_workflow_of_the_history_is_kept() -> None:
    have, shipped = kept(), [entry for entry in history("workflows") if entry[1].endswith(".json")]
    for commit, file in shipped:
        text = git("show", f"{commit}:{file}")
        assert (Path(file).name, matter(text)) in have, f"{file} as of {commit[:8]} is not in shipped_workflows"


def test_what_was_kept_once_is_never_changed() -> None:
    """Else an edit of the fixture could hide that an old workflow no longer loads."""
    for commit, file in history(SHIPPED.relative_to(REPO).as_posix()):
        path = REPO / file
        assert path.is_file() and matter(path.read_text(encoding="utf-8")) == matter(git("show", f"{commit}:{file}"))


@pytest.mark.parametrize(
    "change, same",
    [
        (lambda node: node.update(pos=[9, 9]), True),
        (lambda node: node.update(type="FlexIPOther"), False),
        (lambda node: node["widgets_values"].append(1), False),
        (lambda node: node["inputs"].pop(), False),
    ],
)
def test_what_matters_is_what_a_version_can_break(change, same) -> None:
    before = json.loads((SHIPPED / "flexip_gate_sweep.json").read_text(encoding="utf-8"))
    after = json.loads(json.dumps(before))
    change(next(node for node in after["nodes"] if node["type"] == "FlexIPSampler"))
    assert (matter(json.dumps(before)) == matter(json.dumps(after))) is same
