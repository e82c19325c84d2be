"""What a trained model is worth: loss of any text, and tasks of lm-eval."""

from .perplexity import Perplexity, perplexity
from .score import score

__all__ = ["Perplexity", "perplexity", "score"]
