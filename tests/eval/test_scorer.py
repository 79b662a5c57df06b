"""Scores against a direct forward pass, one text at a time."""

from __future__ import annotations

import pytest
import torch
from tolerances import SAFETY, tolerance

from nested_learning.data.tokenizer import ByteTokenizer, train_sentencepiece
from nested_learning.eval.scorer import IGNORE, SEGMENT, Sampling, Scorer, rolling_windows
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM

TEXTS = ["the quick brown fox ", "jumps over\nthe lazy dog", "how many dogs are there? one dog", "  x  y"]
LENGTH = 2 * 40 * 16  # operations in a row: layers, tokens that a memory passes, width
PAIRS = [
    ("the quick brown", " fox jumps"),
    ("the quick brown", " dog"),
    ("the quick brown", " x"),
    ("how many dogs ", "are there"),
    ("how many dogs", " are there"),
    ("one dog \n", " sleeps"),
    ("", "all day"),
    ("  ", " all day"),
    ("", " one"),
    ("the lazy dog jumps over the quick", " fox"),
    ("the lazy dogs", " sleep all day and all night"),
    ("the lazy cats", " sleep"),
    ("the lazy cats", " eat"),
    ("jump", "s"),
    ("jump", ""),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentencepiece(TEXTS * 20, 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    levels = ({"name": "fast", "chunk_size": 8}, {"name": "mlp"})
    from nested_learning.levels import LevelSpec

    config = HopeConfig(
        vocab_size=300,
        dim=16,
        num_layers=2,
        num_heads=2,
        chunk_size=4,
        levels=tuple(LevelSpec(**level) for level in levels),
    )
    return HopeLM(config).double().eval()


def same(value, dtype=torch.float64, factor=SAFETY):
    return pytest.approx(value, rel=tolerance(LENGTH, dtype, factor))


def direct(model, ids, first):
    """ln p of `ids[first:]` given all before, in one pass, and whether each is the likeliest."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
    wanted = torch.tensor(ids[1:])
    picked = logits.gather(1, wanted[:, None])[:, 0]
    return picked[first - 1 :].sum().item(), bool((logits.argmax(-1) == wanted)[first - 1 :].all())


def expected(model, tokenizer, context, continuation):
    """By the rule in words: the whole text is encoded; white space at the context's end is scored."""
    whole = tokenizer.encode(context + continuation)
    head = len(tokenizer.encode(context.rstrip()))
    if head == 0:
        return direct(model, [tokenizer.eos_id, *whole], 1)
    if head == len(whole):
        return 0.0, True
    return direct(model, whole, head)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_loglikelihood_is_that_of_a_direct_forward_pass(model, tokenizer, batch_size):
    found = Scorer(model, tokenizer, batch_size).loglikelihood(PAIRS)
    for pair, (value, greedy) in zip(PAIRS, found, strict=True):
        wanted = expected(model, tokenizer, *pair)
        assert value == same(wanted[0]), pair
        assert greedy == wanted[1], pair


def test_in_float32_batches_agree(model, tokenizer):
    narrow = HopeLM(model.config)
    narrow.load_state_dict(model.state_dict())
    one, three, eight = (Scorer(narrow, tokenizer, size).loglikelihood(PAIRS) for size in (1, 3, 8))
    for pair, a, b, c in zip(PAIRS, one, three, eight, strict=True):
        assert a[0] == same(expected(narrow, tokenizer, *pair)[0], torch.float32, factor=0.1)
        assert b[0] == same(a[0], torch.float32, factor=0.1)
        assert c[0] == same(a[0], torch.float32, factor=0.1)


def test_greedy_is_true_for_what_the_model_would_write(model, tokenizer):
    context = "the quick brown"
    ids = tokenizer.encode(context)
    written = model.generate(torch.tensor([ids]), 3, temperature=0)[0, len(ids) :].tolist()
    scorer = Scorer(model, tokenizer)
    other = [*written[:2], (written[2] + 1) % 300]
    found = dict(scorer.loglikelihood_of_ids([(ids, written), (ids, other)]))
    assert (found[0][1], found[1][1]) == (True, False)


def test_white_space_at_the_end_of_a_context_belongs_to_the_continuation(model, tokenizer):
    scorer = Scorer(model, tokenizer)
    assert scorer.encode_pair("how many dogs ", "are there") == scorer.encode_pair(
        "how many dogs", " are there"
    )
    head, tail = scorer.encode_pair("one dog \n", " sleeps")
    assert tokenizer.decode(head) == "one dog"
    assert tokenizer.decode(tail) == " \n sleeps"


def test_a_shared_context_is_read_once(tokenizer, model):
    calls = []

    class Counting:
        def __call__(self, tokens, state=None):
            calls.append(tuple(tokens.shape))
            return model(tokens, state)

        init_state = model.init_state

    head = tokenizer.encode("the lazy dog jumps over the quick")
    Scorer(Counting(), tokenizer).loglikelihood(
        [("the lazy dog jumps over the quick", f" {w}") for w in "abcd"]
    )
    assert calls[0] == (1, len(head) - 1)
    assert len(calls) == 2
    assert calls[1][0] == 4
    assert calls[1][1] < len(head) - 1


def test_more_continuations_than_the_batch_holds_still_read_the_context_once(tokenizer, model):
    pairs = [("the quick brown", f" {word}") for word in ("fox", "dog", "x", "y", "day", "one", "lazy")]
    whole = Scorer(model, tokenizer, 8).loglikelihood(pairs)
    assert Scorer(model, tokenizer, 2).loglikelihood(pairs) == [
        (same(value), greedy) for value, greedy in whole
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_rolling_is_the_sum_over_tokens(model, tokenizer, batch_size):
    texts = [*TEXTS, "", "x"]
    found = dict(Scorer(model, tokenizer, batch_size).rolling(texts))
    for i, text in enumerate(texts):
        ids = [tokenizer.eos_id, *tokenizer.encode(text)]
        naive = sum(direct(model, ids[: n + 1], n)[0] for n in range(1, len(ids)))
        assert found[i] == same(naive)


def test_a_text_longer_than_a_segment(model):
    text = "the quick brown fox jumps. " * 40
    tokenizer = ByteTokenizer()
    assert len(text) > 2 * SEGMENT
    found = dict(Scorer(model, tokenizer, 2).rolling([text, text[:700]]))
    assert found[0] == pytest.approx(
        direct(model, [256, *text.encode()], 1)[0], rel=tolerance(2 * len(text) * 16)
    )
    assert found[1] == pytest.approx(
        direct(model, [256, *text[:700].encode()], 1)[0], rel=tolerance(2 * len(text) * 16)
    )
    ((value, _),) = Scorer(model, tokenizer).loglikelihood([(text, " fox")])
    assert value == pytest.approx(direct(model, list((text.rstrip() + "  fox").encode()), len(text) - 1)[0])


@pytest.mark.parametrize(("length", "size"), [(10, 4), (12, 4), (3, 4), (4, 4), (5, 1), (9, 8)])
def test_rolling_windows_are_those_of_lm_eval(length, size):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(100, 100 + length))
    theirs = [
        ((head + tail)[:-1], tail)
        for head, tail in map(make_disjoint_window, get_rolling_token_windows(ids, 0, size, 1))
    ]
    ours = [(x, [t for t in y if t != IGNORE]) for x, y in rolling_windows(ids, 0, size)]
    assert ours == theirs
    assert rolling_windows(ids, 0, None).__next__() == ([0, *ids[:-1]], ids)


def test_windows_score_every_token_with_what_fits(model):
    ids = list(b"the quick brown fox")
    found = dict(Scorer(model, ByteTokenizer(), 2, max_length=6).rolling(["the quick brown fox"]))
    whole, total = [256, *ids], 0.0
    for first, last in ((0, 6), (6, 12), (12, 18), (18, 19)):
        for n in range(first, last):
            total += direct(model, [*whole[max(0, last - 6) : n + 1], ids[n]], n + 1 - max(0, last - 6))[0]
    assert found[0] == same(total)


def test_a_context_that_is_too_long_loses_its_beginning(model):
    scorer = Scorer(model, ByteTokenizer(), max_length=8)
    ((value, _),) = scorer.loglikelihood([("the quick brown", " fox")])
    assert value == same(direct(model, list(b"brown fox"), 5)[0])
    with pytest.raises(ValueError, match="max_length must be at least the tokens of a continuation, 10"):
        scorer.loglikelihood([("the", " quick fox")])


def test_carried_is_one_stream_of_contexts(model):
    tokenizer = ByteTokenizer()
    scorer = Scorer(model, tokenizer, policy="carried")
    pairs = [("the fox", " runs"), ("the fox", " eats"), ("a dog", " runs")]
    found = scorer.loglikelihood(pairs)
    stream = [b"the fox runs", b"the fox eats", b"the foxa dog runs"]
    for (value, _), text in zip(found, stream, strict=True):
        assert value == same(direct(model, list(text), len(text) - 5)[0])
    ((again, _),) = scorer.loglikelihood([("a dog", " runs")])
    assert again == same(found[2][0])  # the context of the request before: not read again
    (rolled,) = dict(scorer.rolling(["one"])).values()
    text = [*b"the foxa dog", 256, *b"one"]
    assert rolled == same(direct(model, text, len(text) - 3)[0])
    ((after, _),) = scorer.loglikelihood([("two", " x")])
    assert after == same(direct(model, [*text, *b"two x"], len(text) + 3)[0])
    scorer.reset()
    assert scorer.loglikelihood(pairs) == found


def test_requests_may_begin_in_a_memory(model):
    tokenizer = ByteTokenizer()
    with torch.no_grad():
        memory = model(torch.tensor([list(b"one dog")]))[1]
    pairs = [("the fox", " runs"), ("the fox", " eats"), ("x", " y")]
    found = Scorer(model, tokenizer, start=memory).loglikelihood(pairs)
    for (value, _), (context, continuation) in zip(found, pairs, strict=True):
        text = list(f"one dog{context}{continuation}".encode())
        assert value == same(direct(model, text, 7 + len(context))[0])
    assert Scorer(model, tokenizer, 1, start=memory).loglikelihood(pairs)[0][0] == pytest.approx(found[0][0])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("policy", ["fresh", "carried"])
def test_greedy_generation_is_that_of_the_model(model, tokenizer, batch_size, policy):
    contexts = ["the quick", "one dog", "", "the lazy fox jumps"]
    scorer = Scorer(model, tokenizer, batch_size, policy)
    found = dict(scorer.generate(contexts, Sampling(max_new_tokens=6)))
    stream: list[int] = []
    for i, context in enumerate(contexts):
        ids = tokenizer.encode(context) or [tokenizer.eos_id]
        stream = [*stream, *ids] if policy == "carried" else ids
        new = model.generate(torch.tensor([stream]), 6, temperature=0)[0, len(stream) :].tolist()
        if tokenizer.eos_id in new:
            new = new[: new.index(tokenizer.eos_id)]
        assert found[i] == tokenizer.decode(new)


def test_generation_ends_before_a_stop_text(model, tokenizer):
    scorer = Scorer(model, tokenizer)
    (whole,) = dict(scorer.generate(["the quick"], Sampling(max_new_tokens=8))).values()
    stop = whole[3:5]
    (cut,) = dict(scorer.generate(["the quick"], Sampling(max_new_tokens=8, until=("?!", stop)))).values()
    assert cut == whole[: whole.index(stop)]


def test_sampling_depends_on_the_seed_only(model, tokenizer):
    def draw(seed):
        sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=seed)
        return list(Scorer(model, tokenizer).generate(["the quick"], sampling))

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "new"}, "policy must be one of fresh, carried, got 'new'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"policy": "carried", "max_length": 8}, "max_length must be None for policy = carried"),
    ],
)
def test_bad_options_are_refused(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        Scorer(model, tokenizer, **options)
