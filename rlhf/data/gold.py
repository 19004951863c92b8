"""The gold scorer VADER: a deterministic scorer that stands for the true reward in an experiment."""

from __future__ import annotations

from collections.abc import Sequence


class VaderGold:
    """VADER's compound sentiment in [-1, 1] (Hutto & Gilbert 2014): a lexicon and rules, about 8,500 texts a second.

    Raises ImportError naming the extra if vaderSentiment is not installed.
    """

    name = "VADER"  # `name` and `meaning` are shown in reports
    meaning = "how positive the words of a response are, from -1 to +1"

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise ImportError("the gold scorer VADER needs vaderSentiment: pip install 'prudent[demo]'") from error
        self._analyser = SentimentIntensityAnalyzer()

    @property
    def lexicon(self) -> dict[str, float]:
        """VADER's words with their valence, from -4 to +4."""
        return dict(self._analyser.lexicon)

    def __call__(self, responses: Sequence[str]) -> list[float]:
        """Return one finite number per response; higher is better."""
        return [float(self._analyser.polarity_scores(text)["compound"]) for text in responses]
