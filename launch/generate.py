"""Continue a prompt with a trained model:  python -m launch.generate --workdir DIR --prompt "def " [--num-tokens 200]

Prints the prompt and its continuation. Exit status: 0, or 2 with one line on stderr for a mistake.
"""

import dataclasses
import sys
from collections.abc import Iterator

import jax
import numpy as np
import tyro

import moe
from launch.cli import one_line_errors, override
from moe.config import at_least
from moe.models.sample import check_sampling, generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continue a prompt with a run's newest checkpoint."""

    workdir: str
    """The run's folder."""
    prompt: str
    """The text to continue; it may be empty."""
    num_tokens: int = 200
    """Most tokens to add; a document that ends earlier is not continued."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable token."""
    top_p: float = 0.95
    """Probability of the nucleus that is drawn from; 1 draws from all tokens."""
    seed: int = 0
    """Of the draws: the same seed gives the same text."""
    num_samples: int = 1
    """How many continuations."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_samples=1)
        if not 0 <= self.seed < 2**32:
            yield "seed", "must be at least 0 and below 2**32"


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    with one_line_errors():
        required = Arguments(workdir=tyro.MISSING, prompt=tyro.MISSING)
        _print_samples(override(required, words, "python -m launch.generate"))
    return 0


def _print_samples(arguments: Arguments) -> None:
    options = {name: getattr(arguments, name) for name in ("num_tokens", "temperature", "top_p")}
    check_sampling(**options)
    run = moe.load(arguments.workdir)
    tokenizer = run.config.data.tokenizer.build()
    begin = np.concatenate([[tokenizer.bos], tokenizer.encode(arguments.prompt)]).astype(np.int32)
    positions, trained = len(begin) + arguments.num_tokens, run.config.data.seq_len
    if positions > trained:
        print(f"note: {positions} positions, of which the model was trained on the first {trained}", file=sys.stderr)
    prompt = np.tile(begin, (arguments.num_samples, 1))
    key = jax.random.key(arguments.seed)
    tokens = generate(run.model, run.params, run.bias_LE, prompt, key=key, eos=tokenizer.eos, step=run.step, **options)
    for number, row in enumerate(np.asarray(tokens), start=1):
        if arguments.num_samples > 1:
            print(f"--- sample {number} of {arguments.num_samples} ---")
        # Prompt and continuation in one piece: a tokenizer may drop the space before a first token.
        print(tokenizer.decode(np.concatenate([begin, row])))


if __name__ == "__main__":
    sys.exit(main())
