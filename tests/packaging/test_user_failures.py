"""What users of neighbouring packs suffer from, ranked as in the survey of their issue threads, and the tests here that would have
caught each. This file fails if one of those tests is gone or renamed, so that no row loses its guard unnoticed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
# row: what users saw -> file: tests
ROWS = {
    "1 a model or encoder file is not found, or only under one name": {
        "comfy/test_load_and_encode.py": ["names_and_folders_of_encoder_files_mean_nothing", "extra_model_paths_yaml_adds_folders_for_adapters_and_encoders"],
        "core/files/test_weights.py": ["missing_files_and_folders_get_their_sentence", "safetensors_are_recognised_by_content"],
        "comfy/test_bad_names.py": ["model_folders_and_files_that_are_linked_in_keep_working"],
    },
    "2 insightface, onnxruntime, compilers": {"packaging/test_install.py": ["wheels_are_there_for_every_system"]},
    "3 two packs on one attention slot": {
        "comfy/test_neighbours.py": ["whatever_was_in_the_slots_before_is_added_to", "what_is_added_to_our_object_is_added_to_what_was_there_before"],
    },
    "4 dtype mismatch": {
        "comfy/test_numerics.py": ["every_precision_of_model_and_adapters_is_as_near_to_float32_as_the_bare_model", "weights_in_fp8_through_comfyuis_own_loader"],
    },
    "5 broken by a ComfyUI update": {
        "packaging/test_environment.py": ["a_normal_run_ends_with_the_oldest_comfyui"],
        "comfy/test_lazy_layers.py": ["an_ip_adapter_file_loads", "a_flexip_file_loads", "the_demo_models_load"],
    },
    "6 encoder, adapter and base do not fit": {
        "comfy/test_load_and_encode.py": ["a_wired_encoder_that_does_not_fit_is_a_sentence", "a_reference_of_another_encoder_with_the_same_widths_is_refused"],
        "comfy/test_guiders.py": ["a_prompt_of_another_checkpoints_clip_is_a_sentence"],
    },
    "7 effects stay, add up or hit another branch": {
        "comfy/test_life_cycle.py": ["nothing_of_the_cached_model_or_its_conditioning_changes"],
        "server/test_state_walk.py": ["every_graph_of_a_walk_gives_what_a_fresh_process_gives", "an_interrupt_at_any_step_leaves_nothing"],
    },
    "8 device literals, backends": {
        "comfy/test_numerics.py": ["no_device_is_named_in_the_pack", "only_pictures_on_the_cpu_are_resized_with_antialiased_bicubic"],
    },
    "9 memory that is not given back": {
        "comfy/test_load_and_encode.py": ["adapters_and_encoders_are_under_comfyuis_memory_manager"],
        "comfy/test_life_cycle.py": ["adapters_leave_for_the_unet_and_none_of_their_bytes_is_needed_during_the_steps", "comfyui_makes_room_for_k_and_v_of_every_row"],
        "comfy/test_cost.py": ["peak_memory_is_the_bare_runs_plus_k_and_v"],
        "server/test_load.py": [],
    },
    "10 a saved workflow stops loading": {
        "comfy/test_schema.py": ["schemas_equal_the_snapshot", "every_snapshot_that_was_ever_committed_is_still_served"],
        "packaging/test_shipped.py": ["every_workflow_of_the_history_is_kept"],
        "server/test_templates.py": ["workflow_opens_complete"],
    },
    "11 identity against prompt is one coarse number": {
        "comfy/test_demo_tradeoff.py": ["gate_1_keeps_the_subject_and_gate_0_lets_it_go", "identity_grows_with_the_gate"],
    },
    "12 masks, odd sizes, tiles": {
        "comfy/test_space.py": ["masks_of_any_size_and_number_act_per_token_on_latents_of_any_size", "a_masked_out_place_keeps_the_text_attention_bit_for_bit", "tiles_see_their_part_of_the_mask"],
    },
    "13 a setting has no effect": {
        "comfy/test_numerics.py": ["strength_0_is_the_bare_model_bit_for_bit_in_every_precision", "outside_the_window_is_the_bare_model_bit_for_bit_in_every_precision"],
        "comfy/test_sampler_node.py": ["a_sweep_shows_its_gates_in_prompts_that_bring_their_own"],
        "comfy/test_neighbours.py": ["blocks_that_a_later_node_takes_are_counted_in_the_report", "a_node_that_drops_our_options_gives_the_bare_picture_and_a_warning"],
    },
    "14 batches and animation mix identities": {
        "comfy/test_animatediff.py": ["every_frame_of_a_sliding_window_keeps_its_own_gate_and_mask"],
        "comfy/test_guiders.py": ["packs_that_reorder_or_split_the_batch_keep_every_rows_reference_and_gate"],
        "comfy/test_time.py": ["gates_along_the_batch_equal_single_runs"],
    },
    "15 node names collide": {"comfy/test_schema.py": ["node_ids_do_not_collide_with_core"]},
    "16 attention backends": {
        "comfy/test_backends.py": ["every_attention_backend_gives_the_same_picture"],
        "comfy/test_numerics.py": ["every_attention_of_comfyui_in_every_precision", "the_head_widths_of_real_unets"],
    },
    "17 requirements.txt changes torch or numpy": {
        "packaging/test_install.py": ["requirements_add_themselves_and_what_they_lack", "pip_freeze_differs_by_the_packs_own_packages_and_what_they_lack"],
    },
    "18 reference pictures: alpha, crop, sizes": {
        "core/pictures/test_crop.py": ["transparent_pixels_show_the_neutral_ground_whatever_their_colour", "strips_and_single_pixels_work"],
        "comfy/test_load_and_encode.py": ["pictures_of_different_sizes_are_one_reference", "the_preview_is_what_the_encoder_saw"],
    },
    "19 broken or pickled weight files": {
        "core/files/test_weights.py": ["a_pickle_with_code_never_runs_it", "every_damaged_safetensors_file_gets_its_sentence"],
        "core/files/test_fuzz_files.py": [],
        "core/files/test_fuzz_pickles.py": [],
    },
    "20 slow": {
        "comfy/test_cost.py": ["a_constant_gate_adds_a_handful_of_operations_and_nothing_else", "a_window_reads_one_value_per_call"],
        "comfy/test_life_cycle.py": ["a_second_run_with_another_gate_loads_no_adapter"],
    },
    "21 a missing input is a NoneType": {"comfy/test_load_and_encode.py": ["what_is_no_picture_is_a_sentence"], "comfy/test_bad_input.py": []},
    "22 examples that lack files": {"server/test_templates.py": ["workflow_runs"], "packaging/test_workflow.py": ["shipped_workflow_is_tidy"]},
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_every_failure_of_the_neighbours_has_its_tests_here(row: str) -> None:
    for file, names in ROWS[row].items():
        found = set(re.findall(r"^def test_(\w+)", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE))
        assert found, f"{file} has no tests"
        assert set(names) <= found, f"{file} lacks {sorted(set(names) - found)}"


def test_no_row_of_the_survey_is_left_out() -> None:
    assert [int(row.split()[0]) for row in ROWS] == list(range(1, 23))
