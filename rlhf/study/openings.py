"""Openings of a story, as prompts for a model that was trained on TinyStories."""

from __future__ import annotations

_WHO = (
    "a little girl named Lily",
    "a boy named Tim",
    "a small dog",
    "an old cat",
    "a big bear",
    "a bird",
    "a man",
    "Mom",
    "a rabbit",
    "two friends",
    "a girl named Sue",
    "a boy named Ben",
    "a frog",
    "a mouse",
    "a fish",
    "Dad",
)
_WHERE = (
    "was in the park",
    "saw a big box",
    "had a toy",
    "went to the sea",
    "found a key",
    "was not happy",
    "ran home",
    "said",
    "looked at the sky",
    "wanted to play",
    "fell down",
    "ate a red apple",
    "went to sleep",
    "lost a ball",
    "made a cake",
    "heard a loud noise",
    "sat under a tree",
    "met a new friend",
    "opened the door",
    "was very hungry",
)


def openings(heroes: int = len(_WHO), events: int = len(_WHERE)) -> list[str]:
    """`heroes` x `events` different openings, at most 16 x 20, all of one hero after another."""
    return [f"One day, {who} {where}" for who in _WHO[:heroes] for where in _WHERE[:events]]
