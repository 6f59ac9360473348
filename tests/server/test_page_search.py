"""The node search finds our nodes by the words that artists type; in the search's own order, which weighs names before aliases."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page
from server import ComfyServer
from test_page import browser, example_picture, open_page, page  # noqa: F401

# By the page's own service, which every search of nodes asks. Vue and canvas nodes share it.
SEARCH = """query => document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia
    ._s.get('nodeDef').nodeSearchService.searchNode(query).map(node => node.name)"""
START, LOAD, APPLY, ENCODE = "FlexIPStart", "LoadFlexIPAdapters", "ApplyFlexIPGate", "EncodeReference"
FIRST = 1
HITS = 40  # a page of the list, scrolled; many nodes of ComfyUI have such a word in their name
QUERIES = [
    ("ip adapter", LOAD, FIRST),  # has both words in its name, which counts before any alias
    ("ip adapter", START, FIRST + 1),
    ("IP-Adapter", START, FIRST),
    ("ipadapter", LOAD, FIRST),
    ("ipadapter", START, FIRST + 1),
    ("identity", START, FIRST),
    ("likeness", START, FIRST),
    ("consistent character", START, FIRST),
    ("consistency", START, FIRST),
    ("same person", START, FIRST),
    ("keep subject", START, FIRST),
    ("image prompt", START, FIRST),
    ("unified loader", LOAD, FIRST),
    ("weight type", "FlexIPGateSchedule", FIRST),
    ("face", START, HITS),
    ("style", START, HITS),
    ("style", "FlexIPBlocks", HITS),
    ("composition", "FlexIPBlocks", HITS),
    ("character", START, HITS),
    ("character", "FlexIPLoadReference", HITS),
    ("reference", ENCODE, HITS),
    ("mask", APPLY, None),
    ("negative image", "FlexIPCombineReferences", HITS),
]
NOT_OURS = ("face swap", "flux", "instantid")  # no alias for what no node does


@pytest.mark.parametrize("page", [False], ids=["canvas"], indirect=True)
def test_words_that_artists_type_find_the_node(page: Page, comfy: ComfyServer) -> None:
    open_page(page, comfy)
    missed = []
    for query, node, bound in QUERIES:
        found = page.evaluate(SEARCH, query)
        rank = found.index(node) + 1 if node in found else None
        if rank is None or bound is not None and rank > bound:
            missed.append(f"{query!r}: {node} is number {rank} of {len(found)}, behind {found[:3]}; bound {bound}")
    assert not missed, "\n".join(missed)
    aliases = page.evaluate(
        "fetch('/object_info').then(a => a.json()).then(all => Object.values(all).filter(n => n.category.startsWith('FlexIP/')).flatMap(n => n.search_aliases))"
    )
    assert not [word for word in NOT_OURS if any(word in alias for alias in aliases)]
    assert page.problems == []
