"""Benchmarks as their authors ship them, and folders of generated pictures."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

import pytest

from flexip_core.evaluation import benchmark
from flexip_core.evaluation.benchmark import (
    Benchmark,
    Case,
    Subject,
    find_pictures,
    picture_name,
    read_benchmark,
    read_outputs,
)

# the syntax of google/dreambooth's file, with fewer lines
DREAMBENCH = """Classes

subject_name,class
backpack_dog,backpack
cat2,cat
dog6,dog
wolf_plushie,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a {0} {1} wearing a black top hat and a monocle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]
"""


def put(path: Path, content: str | bytes = b"picture") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def dreambench(folder: Path, text: str = DREAMBENCH) -> Path:
    put(folder / "dataset" / "prompts_and_classes.txt", text)
    for name in ("backpack_dog", "cat2", "dog6", "wolf_plushie"):
        for number in (1, 0):
            put(folder / "dataset" / name / f"{number:02d}.jpg")
    return folder


def dreambench_plus(folder: Path) -> Path:
    for category, number, text in (
        ("live_subject/animal", "00", "kitten\na kitten on a rug\nkitten, oil painting"),
        ("object", "00", "Rolls-Royce hood ornament\nan ornament in snow\nan ornament, pixel art"),
        ("style", "03", "ukiyo-e\na cat\na dog\n"),
    ):
        put(folder / "data" / "images" / category / f"{number}.jpg")
        put(folder / "data" / "captions" / category / f"{number}.txt", text)
    return folder


def small(subjects: int = 2, prompts: int = 2) -> Benchmark:
    found = [Subject(f"dog{n}", "live", (Path("00.jpg"),), "dog") for n in range(subjects)]
    return Benchmark("small", tuple(Case(s, n, f"prompt {n}") for s in found for n in range(prompts)))


def generate(benchmark: Benchmark, tree: Path, images: int = 1) -> None:
    for case in benchmark.cases:
        for image in range(images):
            name = picture_name(case, image)
            put(tree / "src_image" / f"{name}.jpg", case.subject.name)
            put(tree / "text" / f"{name}.txt", case.prompt + "\n")
            put(tree / "tgt_image" / f"{name}.png", name)


# reading benchmarks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "dataset"])
def test_dreambench_is_read_from_its_checkout_without_the_unique_token(tmp_path: Path, inside: str) -> None:
    benchmark = read_benchmark(dreambench(tmp_path) / inside)
    assert [(c.subject.name, c.number, c.prompt) for c in benchmark.cases] == [
        ("backpack_dog", 0, "a backpack in the jungle"),
        ("backpack_dog", 1, "a red backpack"),
        ("cat2", 0, "a cat in the jungle"),
        ("cat2", 1, "a cat wearing a black top hat and a monocle"),
        ("cat2", 2, "a cube shaped cat"),
        ("dog6", 0, "a dog in the jungle"),
        ("dog6", 1, "a dog wearing a black top hat and a monocle"),
        ("dog6", 2, "a cube shaped dog"),
        ("wolf_plushie", 0, "a stuffed animal in the jungle"),
        ("wolf_plushie", 1, "a red stuffed animal"),
    ]
    assert {s.name: (s.category, s.class_word) for s in benchmark.subjects} == {
        "backpack_dog": ("object", "backpack"),
        "cat2": ("live", "cat"),
        "dog6": ("live", "dog"),
        "wolf_plushie": ("object", "stuffed animal"),
    }
    assert [path.name for path in benchmark.subjects[0].references] == ["00.jpg", "01.jpg"]


def test_dreambench_with_windows_line_ends_reads_the_same(tmp_path: Path) -> None:
    plain = read_benchmark(dreambench(tmp_path))
    put(tmp_path / "dataset" / "prompts_and_classes.txt", DREAMBENCH.replace("\n", "\r\n"))
    assert read_benchmark(tmp_path) == plain


@pytest.mark.parametrize(
    "old, new",
    [
        ("'a red {0} {1}'.format(unique_token, class_token)", "__import__('os').remove('MARK')"),
        ("'a red {0} {1}'.format(unique_token, class_token)", "open('MARK', 'w').format(unique_token, class_token)"),
        ("'a red {0} {1}'.format(unique_token, class_token)", "'a red {0}'.format(unique_token, class_token)"),
        ("'a red {0} {1}'.format(unique_token, class_token)", "'a red {0} {1}'.format(class_token, unique_token)"),
        ("'a red {0} {1}'.format(unique_token, class_token)", "'a red {0} {1}"),
        ("'a red {0} {1}'.format(unique_token, class_token)", "5 .format(unique_token, class_token)"),
        ("Live Subject Prompts", "Others"),
        ("dog6,dog", "dog6"),
    ],
)
def test_a_changed_prompt_file_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    monkeypatch.chdir(tmp_path)
    mark = put(tmp_path / "MARK", "as it was")
    with pytest.raises(ValueError, match=r"prompts_and_classes\.txt"):
        read_benchmark(dreambench(tmp_path / "b", DREAMBENCH.replace(old, new)))
    assert mark.read_text() == "as it was"


def test_dreambench_without_the_pictures_of_a_subject_names_it(tmp_path: Path) -> None:
    dreambench(tmp_path)
    for path in (tmp_path / "dataset" / "dog6").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="dog6: the pictures of this subject are missing"):
        read_benchmark(tmp_path)


@pytest.mark.parametrize("inside", ["", "data"])
def test_dreambench_plus_gets_the_names_that_its_own_code_gives_to_results(tmp_path: Path, inside: str) -> None:
    benchmark = read_benchmark(dreambench_plus(tmp_path) / inside)
    assert [(s.name, s.category, s.class_word) for s in benchmark.subjects] == [
        ("live_subject_animal_00_kitten", "animal", "kitten"),
        ("object_00_rolls-royce_hood_ornament", "object", "Rolls-Royce hood ornament"),
        ("style_03_ukiyo-e", "style", "ukiyo-e"),
    ]
    assert [c.prompt for c in benchmark.cases if c.subject.category == "animal"] == [
        "a kitten on a rug",
        "kitten, oil painting",
    ]
    assert [c.number for c in benchmark.cases] == [0, 1] * 3


@pytest.mark.parametrize("text", ["", "kitten", "kitten\n\na prompt"])
def test_dreambench_plus_with_a_broken_caption_names_it(tmp_path: Path, text: str) -> None:
    dreambench_plus(tmp_path)
    put(tmp_path / "data" / "captions" / "style" / "03.txt", text)
    with pytest.raises(ValueError, match=r"03\.txt"):
        read_benchmark(tmp_path)


def test_dreambench_plus_with_a_picture_without_caption_names_it(tmp_path: Path) -> None:
    dreambench_plus(tmp_path)
    put(tmp_path / "data" / "images" / "object" / "07.jpg")
    with pytest.raises(ValueError, match="object/07"):
        read_benchmark(tmp_path)


def test_a_plain_folder_is_a_benchmark(tmp_path: Path) -> None:
    put(tmp_path / "prompts.txt", "a {class} in snow\n\na {class} and another {class}\n")
    for name in ("b", "a"):
        put(tmp_path / name / "class.txt", "garden gnome\n")
        put(tmp_path / name / "one.PNG")
        put(tmp_path / name / ".hidden.png")
    benchmark = read_benchmark(tmp_path)
    assert [(c.subject.name, c.number, c.prompt) for c in benchmark.cases] == [
        (name, number, prompt)
        for name in "ab"
        for number, prompt in enumerate(["a garden gnome in snow", "a garden gnome and another garden gnome"])
    ]
    assert [path.name for path in benchmark.subjects[0].references] == ["one.PNG"]


def test_a_plain_folder_with_faults_names_the_file(tmp_path: Path) -> None:
    prompts = put(tmp_path / "prompts.txt", "a dog\n")
    with pytest.raises(ValueError, match=r"\{class\}"):
        read_benchmark(tmp_path)
    prompts.write_text("a {class}")
    with pytest.raises(ValueError, match="a folder per subject"):
        read_benchmark(tmp_path)
    put(tmp_path / "a" / "one.png")
    with pytest.raises(ValueError, match=r"class\.txt is missing"):
        read_benchmark(tmp_path)
    prompts.write_bytes(b"a {class} \xff")
    with pytest.raises(ValueError, match=r"prompts\.txt .*UTF-8"):
        read_benchmark(tmp_path)


def test_any_other_folder_is_told_what_was_expected(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"DreamBench .*DreamBench\+\+ .*prompts\.txt"):
            read_benchmark(folder)
    generate(small(), tmp_path)
    with pytest.raises(ValueError, match="generated pictures, not a benchmark"):
        read_benchmark(tmp_path)


def test_quick_takes_four_subjects_of_all_categories_and_five_prompts() -> None:
    subjects = [Subject(f"{c}{n}", c, (Path("0.jpg"),), c) for c, n in (("live", 1), ("object", 0), ("live", 0))]
    subjects += [Subject(f"object{n}", "object", (Path("0.jpg"),), "object") for n in range(1, 9)]
    whole = Benchmark("whole", tuple(Case(s, n, f"{n}") for s in subjects for n in range(25)))
    quick = whole.quick()
    assert sorted(s.name for s in quick.subjects) == ["live0", "live1", "object0", "object8"]
    assert [c.number for c in quick.cases] == [0, 6, 12, 18, 24] * 4
    assert set(quick.cases) <= set(whole.cases)
    assert quick.name == "whole (quick)"
    shuffled = Benchmark("whole", tuple(case for s in subjects[::-1] for case in whole.cases if case.subject == s))
    assert set(shuffled.quick().cases) == set(quick.cases)


def test_quick_of_a_smaller_benchmark_is_all_of_it() -> None:
    assert small(3, 2).quick().cases == small(3, 2).cases


# finding pictures ------------------------------------------------------------------------------------------------------


def test_pictures_of_a_folder_without_gates(tmp_path: Path) -> None:
    generate(small(), tmp_path, images=2)
    pictures = find_pictures(small(), tmp_path, 2)
    assert [(p.case.subject.name, p.case.number, p.image, p.gate) for p in pictures] == [
        (name, number, image, None) for name in ("dog0", "dog1") for number in (0, 1) for image in (0, 1)
    ]
    assert pictures[3].path == tmp_path / "tgt_image" / "dog0-01-1.png"


def test_pictures_of_a_sweep_come_by_rising_gate(tmp_path: Path) -> None:
    for gate in ("1", "0.50", "0.05"):
        generate(small(), tmp_path / f"gate_{gate}")
    pictures = find_pictures(small(), tmp_path, 1)
    assert [p.gate for p in pictures] == [0.05] * 4 + [0.5] * 4 + [1.0] * 4


def test_pictures_as_dreambench_plus_writes_them(tmp_path: Path) -> None:
    benchmark = read_benchmark(dreambench_plus(tmp_path / "b"))
    for case in benchmark.cases:
        put(tmp_path / "run" / "tgt_image" / case.subject.name / f"{case.number}_0.jpg")
    assert [p.case for p in find_pictures(benchmark, tmp_path / "run", 1)] == list(benchmark.cases)


def test_missing_pictures_are_listed_and_counted(tmp_path: Path) -> None:
    benchmark = small(3, 10)
    generate(benchmark, tmp_path, images=1)
    (tmp_path / "tgt_image" / "dog1-07-0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 30 pictures .* missing or empty .*: tgt_image/dog1-07-0\. "):
        find_pictures(benchmark, tmp_path, 1)
    with pytest.raises(ValueError) as caught:
        find_pictures(benchmark, tmp_path, 2)
    message = str(caught.value)
    assert message.startswith("31 of 60") and "and 11 more" in message
    assert len(re.findall(r"tgt_image/dog", message)) == 20


def test_one_missing_picture_at_one_gate_refuses_the_whole_sweep(tmp_path: Path) -> None:
    for gate in ("0.00", "0.50"):
        generate(small(), tmp_path / f"gate_{gate}")
    (tmp_path / "gate_0.50" / "tgt_image" / "dog0-01-0.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 8 .*gate_0\.50/tgt_image/dog0-01-0"):
        find_pictures(small(), tmp_path, 1)


def test_extra_and_misnamed_files_are_warned_about_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generate(small(), tmp_path, images=2)
    put(tmp_path / "tgt_image" / "Copy of dog0-00-0.png")
    put(tmp_path / "tgt_image" / "Thumbs.db")
    put(tmp_path / "tgt_image" / ".DS_Store")
    os.close(os.open(os.fsencode(tmp_path / "tgt_image") + b"/dog\xff.png", os.O_CREAT))
    with caplog.at_level(logging.WARNING):
        assert len(find_pictures(small(), tmp_path, 1)) == 4
    assert "6 files" in caplog.text  # four second images, the copy and the broken name
    assert all(part in caplog.text for part in ("Copy of dog0-00-0.png", "dog0-00-1.png", "dog\\udcff"))
    assert "Thumbs.db" not in caplog.text and ".DS_Store" not in caplog.text
    caplog.text.encode()


def test_folders_that_only_look_like_gates_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generate(small(), tmp_path / "gate_0.50")
    (tmp_path / "gate_open" / "tgt_image").mkdir(parents=True)
    (tmp_path / "gate_0.70").mkdir()
    with caplog.at_level(logging.WARNING):
        assert len(find_pictures(small(), tmp_path, 1)) == 4
    assert "gate_open" in caplog.text and "gate_0.70" in caplog.text


def test_two_files_for_one_picture_are_refused(tmp_path: Path) -> None:
    generate(small(), tmp_path)
    double = put(tmp_path / "tgt_image" / "dog0-00-0.webp")
    with pytest.raises(ValueError, match="the same name"):
        find_pictures(small(), tmp_path, 1)
    double.unlink()
    put(tmp_path / "tgt_image" / "dog0" / "0_0.png")
    with pytest.raises(ValueError, match=r"two names, dog0-00-0, dog0/0_0"):
        find_pictures(small(), tmp_path, 1)


def test_ambiguous_gates_are_refused(tmp_path: Path) -> None:
    generate(small(), tmp_path / "gate_0.5")
    generate(small(), tmp_path / "gate_0.50")
    with pytest.raises(ValueError, match="the same gate"):
        find_pictures(small(), tmp_path, 1)
    generate(small(), tmp_path / "b" / "gate_0.5")
    generate(small(), tmp_path / "b")
    with pytest.raises(ValueError, match="beside folders of gates"):
        find_pictures(small(), tmp_path / "b", 1)


def test_pictures_of_other_prompts_are_refused(tmp_path: Path) -> None:
    generate(small(), tmp_path)
    put(tmp_path / "text" / "dog1-00-0.txt", "a sks dog")
    with pytest.raises(ValueError, match=r"1 prompts .*text/dog1-00-0\.txt"):
        find_pictures(small(), tmp_path, 1)


def test_a_folder_without_pictures_and_a_senseless_count_are_refused(tmp_path: Path) -> None:
    for read in (lambda: find_pictures(small(), tmp_path, 1), lambda: read_outputs(tmp_path)):
        with pytest.raises(ValueError, match="expected src_image, text and tgt_image"):
            read()
    with pytest.raises(ValueError, match="at least 1"):
        find_pictures(small(), tmp_path, 0)


# outputs without a benchmark -------------------------------------------------------------------------------------------


def test_our_own_folder_reads_back_as_the_benchmark_it_was_made_from(tmp_path: Path) -> None:
    for gate in ("0.30", "0.70"):
        generate(small(), tmp_path / "flexip" / f"gate_{gate}", images=2)
    benchmark, pictures = read_outputs(tmp_path / "flexip")
    assert benchmark.name == "flexip"
    assert [(c.subject.name, c.number, c.prompt) for c in benchmark.cases] == [
        (c.subject.name, c.number, c.prompt) for c in small().cases
    ]
    known = find_pictures(benchmark, tmp_path / "flexip", 2)
    assert sorted(pictures, key=str) == sorted(known, key=str) and len(pictures) == 16
    assert [len(s.references) for s in benchmark.subjects] == [1, 1]  # the same picture four times


def test_results_of_dreambench_plus_code_are_read_with_prompts_and_references(tmp_path: Path) -> None:
    for subject, source in (("live_subject_animal_00_kitten", "k"), ("style_10_ukiyo-e", "u")):
        for number in range(11):
            put(tmp_path / "src_image" / subject / f"{number}_0.jpg", source)
            put(tmp_path / "text" / subject / f"{number}_0.txt", f"prompt {number}")
            put(tmp_path / "tgt_image" / subject / f"{number}_0.jpg")
    put(tmp_path / "negative_prompt.txt", "")
    benchmark, pictures = read_outputs(tmp_path)
    assert [c.number for c in benchmark.cases] == [*range(11)] * 2
    assert benchmark.cases[10].prompt == "prompt 10"
    assert {s.name: s.category for s in benchmark.subjects} == {
        "live_subject_animal_00_kitten": "animal",
        "style_10_ukiyo-e": "style",
    }
    assert benchmark.subjects[0].references == (tmp_path / "src_image/live_subject_animal_00_kitten/0_0.jpg",)
    assert pictures[2].path == tmp_path / "tgt_image/live_subject_animal_00_kitten/2_0.jpg"


def test_foreign_names_are_one_subject_each_and_endings_may_differ(tmp_path: Path) -> None:
    for name in ("my cat v1.5", "über-1"):
        put(tmp_path / "src_image" / f"{name}.jpeg", name)
        put(tmp_path / "text" / f"{name}.txt", "\ufeffa cat")
        put(tmp_path / "tgt_image" / f"{name}.PNG")
    benchmark, pictures = read_outputs(tmp_path)
    assert [(p.case.subject.name, p.case.number, p.image, p.case.prompt) for p in pictures] == [
        ("my cat v1.5", 0, 0, "a cat"),
        ("über-1", 0, 0, "a cat"),
    ]
    assert len(benchmark.cases) == 2


def test_a_subject_keeps_all_its_different_source_pictures(tmp_path: Path) -> None:
    generate(small(1, 3), tmp_path)
    put(tmp_path / "src_image" / "dog0-02-0.jpg", "another view")
    benchmark, _ = read_outputs(tmp_path)
    assert [path.name for path in benchmark.subjects[0].references] == ["dog0-00-0.jpg", "dog0-02-0.jpg"]


@pytest.mark.parametrize("kind, ending", [("src_image", "jpg"), ("text", "txt"), ("tgt_image", "png")])
def test_a_name_that_is_not_in_all_three_folders_is_listed(tmp_path: Path, kind: str, ending: str) -> None:
    for gate in ("0.3", "0.7"):
        generate(small(), tmp_path / f"gate_{gate}")
    (tmp_path / "gate_0.7" / kind / f"dog1-01-0.{ending}").unlink()
    with pytest.raises(ValueError, match=rf"1 files are missing .*: gate_0\.7/{kind}/dog1-01-0\."):
        read_outputs(tmp_path)


def test_two_prompts_under_one_number_are_refused(tmp_path: Path) -> None:
    generate(small(), tmp_path, images=2)
    put(tmp_path / "text" / "dog0-01-1.txt", "something else")
    with pytest.raises(ValueError, match=r"dog0-01-1\.txt says 'something else'"):
        read_outputs(tmp_path)


def test_empty_folders_of_pictures_are_told_apart_from_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "tgt_image").mkdir()
    with pytest.raises(ValueError, match="no picture in them"):
        read_outputs(tmp_path)


@pytest.mark.parametrize(
    "unit",
    [
        "\n",
        " \n",
        "subject_name,class\n",
        "subject_name,class\n\n",
        "Object Prompts\n",
        "Object Prompts\nprompt_list = [\n",
        "x,y\n",
    ],
)
def test_a_prompt_file_is_read_line_by_line(tmp_path: Path, unit: str) -> None:
    """Twice the file, twice the lines of code that run; and whatever it is made of, one sentence."""

    def lines(count: int) -> int:
        run = 0

        def trace(frame, event, arg):
            nonlocal run
            run += event == "line"
            return trace

        text = "subject_name,class\n" + unit * count
        sys.settrace(trace)
        try:
            benchmark._sections(text)
        finally:
            sys.settrace(None)
        return run

    assert lines(2000) <= 2.2 * lines(1000) + 50
    with pytest.raises(ValueError, match="expected|cannot be read"):
        read_benchmark(dreambench(tmp_path, "subject_name,class\n" + unit * 25_000))


@pytest.mark.parametrize("code", ["(" * 500, "[" * 100_000, "-" * 50_000 + "1", "'a' " + "+ 'a'" * 20_000])
def test_prompts_of_endless_code_are_a_sentence(tmp_path: Path, code: str) -> None:
    text = DREAMBENCH.replace(
        "'a red {0} {1}'.format(unique_token, class_token)", f"({code}).format(unique_token, class_token)"
    )
    with pytest.raises(ValueError, match="a list of prompts cannot be read"):
        read_benchmark(dreambench(tmp_path, text))


def test_a_text_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    dreambench(tmp_path)
    with (tmp_path / "dataset/prompts_and_classes.txt").open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(ValueError, match="is longer than 1048576 bytes"):
        read_benchmark(tmp_path)
