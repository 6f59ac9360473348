"""FlexIPAttentionMaps of words: which text tokens a word of the prompt is, and where they are looked at."""

import comfy.context_windows
import comfy.sd1_clip
import comfy.sdxl_clip
import pytest
import tiny
import torch
from flexip_pack.nodes import maps as node
from flexip_pack.nodes import runtime
from looking import (  # noqa: F401 - fixtures among them
    FINEST,
    FakeClip,
    FakeVae,
    M,
    N,
    P,
    clip,
    gated,
    latent,
    model,
    network,
    raw,
    run,
    set_mask,
    watch_blocks,
)


def test_words_of_a_prompt_with_weights_chunks_and_repeats(clip):
    words, length = node.tokenized(clip, "A (red:1.3) fox, the sleepiest fox")
    assert length == 77
    assert [word.text for word in words] == ["a", "red", "fox", ",", "the", "sleepiest", "fox"]
    assert words[0].tokens == (1,) and len(words[5].tokens) > 1
    spelled = [token for word in words for token in word.tokens]
    assert spelled == list(range(1, len(spelled) + 1))


def test_words_of_a_long_prompt_lie_in_chunks_of_77(clip):
    text = ", ".join(f"word{'abcdefghij'[i % 10]}" for i in range(60)) + ", zebra"
    words, length = node.tokenized(clip, text)
    (zebra,) = [word for word in words if word.text == "zebra"]
    chunks = clip.tokenize(text)["l"]
    assert length == 77 * len(chunks) and len(chunks) > 1
    ids = [token for chunk in chunks for token, _ in chunk]
    assert clip.tokenizer.clip_l.decode([ids[place] for place in zebra.tokens]).strip() == "zebra"
    assert all(ids[place] not in (49406, 49407) for word in words for place in word.tokens)


def test_words_in_other_scripts_are_readable(clip):
    words, _ = node.tokenized(clip, "ein Mädchen, 猫")
    assert [word.text for word in words] == ["ein", "mädchen", ",", "猫"]


def test_embeddings_are_words_of_their_own(tmp_path):
    torch.save({"emb_params": torch.randn(3, 768)}, tmp_path / "style.pt")
    torch.save({"emb_params": torch.randn(2, 768)}, tmp_path / "other.pt")
    clip = FakeClip(embedding_directory=str(tmp_path))
    words, length = node.tokenized(clip, "a embedding:style embedding:other cat")
    found = {word.text: word.tokens for word in words}
    assert length == 77 and found == {"a": (1,), "embedding 1": (2, 3, 4), "embedding 2": (5, 6), "cat": (7,)}


def test_sdxl_and_sd15_find_the_same_words():
    text = "A (red:1.3) fox, sleepiest"
    assert node.tokenized(FakeClip(comfy.sdxl_clip.SDXLTokenizer), text) == node.tokenized(FakeClip(), text)


def test_word_maps_are_the_texts_own_attention(gated, clip, monkeypatch):
    blocks = watch_blocks(monkeypatch)
    result = raw(gated, "words", clip=clip, prompt="a red fox", steps=1, blocks=FINEST)
    (block,) = blocks
    for place, got in enumerate(result, start=1):
        one = torch.zeros_like(block.v)
        one[:, place] = 1.0  # in every channel of every head: the softmax's weight itself
        weights = tiny.naive_softmax(block.q[0], block.k[0], one[0], block.heads).mean(dim=1)
        torch.testing.assert_close(got[0].flatten(), weights, rtol=1e-4, atol=1e-7)


def test_the_maps_of_all_words_leave_room_for_start_end_and_padding(gated, clip):
    letters = "abcdefghijklmnopqrst"
    result = raw(gated, "words", clip=clip, prompt=", ".join(letters))
    assert len(result) == 20 and result.min() > 0 and result.sum(dim=0).max() < 1


def test_chosen_words_and_phrases(gated, clip):
    prompt = "a red fox in a (red hat:1.2)"
    every = dict(zip(("a", "red", "fox", "in", "hat"), raw(gated, "words", clip=clip, prompt=prompt)))
    chosen = raw(gated, "words", clip=clip, prompt=prompt, words="Fox, red hat")
    assert len(chosen) == 2 and torch.equal(chosen[0], every["fox"])
    assert (chosen[1] > every["hat"]).all() and (chosen[1] < every["hat"] + every["red"]).all()


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
def test_words_of_the_personalization_adapter(model, clip, mode):
    link = tiny.link_for(tiny.tiny_network(model, mode), tiny.tiny_reference(), 0.3)
    gated = runtime.attach(model, link)
    words = raw(gated, "words (personalization)", clip=clip, prompt="a red fox", blocks=FINEST)
    whole = raw(gated, blocks=FINEST)[2]
    assert len(words) == 3 and words.min() > 0 and words.sum(dim=0).max() < 3 * whole.max()
    none = raw(
        runtime.attach(model, tiny.link_for(link.network, link.reference, 1.0)),
        "words (personalization)",
        clip=clip,
        prompt="a red fox",
        blocks=FINEST,
    )
    assert none.eq(0).all()


def test_words_are_those_of_the_first_prompt(gated, clip):
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    # the second text is longer, so core repeats the first one's tokens in the call
    both = set_mask(P, left) + set_mask(tiny.cond(4, tokens=154), 1 - left)
    result = raw(gated, "words", positive=both, clip=clip, prompt="a fox")
    assert result[..., 4:].eq(0).all()
    assert tiny.relative_error(result[..., :4], raw(gated, "words", clip=clip, prompt="a fox")[..., :4]) < 1e-5


def test_words_can_be_looked_at_with_strength_zero(model, network, clip):
    gated = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference(), strength=0.0))
    sheet, masks, report = run(gated, "words", clip=clip, prompt="a red fox")
    assert masks.max() == 1 and "strength 0" in report and sheet.shape[0] == 1


def test_only_some_words_of_a_long_prompt_are_shown(gated, clip):
    prompt = " ".join(f"{a}{b}" for a in "bcdfgh" for b in "aeiouy")
    sheet, masks, report = run(gated, "words", clip=clip, prompt=prompt, positive=tiny.cond(1, tokens=154))
    assert len(masks) == node.MOST_WORDS and "36 different words, and the first 32 are shown" in report
    assert sheet.shape[2] < 7 * node.SHEET and sheet.shape[1] > 6 * node.SHEET, "33 columns in bands of 6"
