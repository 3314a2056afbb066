import copy
import functools

import pytest
import torch

from labkit import engine_study
from labkit.model import Config, Llama
from labkit.speculative import Cache, Run, generate, lookup, verify

VOCAB = 13


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The model is tiny: two threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def tiny(**changes):
    """Random weights in fp64, so that no margin is small enough for rounding to decide."""
    torch.manual_seed(5)
    sizes = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = Llama(Config(**sizes | changes)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


PROMPT = [3, 1, 4, 1, 5]


@functools.cache
def plain(length=24):
    with torch.inference_mode():
        return engine_study.one_by_one(tiny(), PROMPT, length)[0]


def oracle(tokens, k):
    """Drafts what the model will write."""
    return (PROMPT + plain(64))[len(tokens) : len(tokens) + k]


def wrong(tokens, k):
    """Drafts what the model will not write."""
    return [(token + 1) % VOCAB for token in oracle(tokens, k)]


def half(tokens, k):
    """Right up to the middle of the draft."""
    draft = oracle(tokens, k)
    return draft[: k // 2] + wrong(tokens, k)[k // 2 :]


# ---- greedy acceptance


@pytest.mark.parametrize(
    ("draft", "own", "new"),
    [
        ([], [7], [7]),
        ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3], [9, 2, 3, 4], [9]),
        ([1, 2, 3], [1, 9, 3, 4], [1, 9]),  # what comes after the first difference does not count
        ([1, 2, 3], [1, 2, 9, 4], [1, 2, 9]),
    ],
)
def test_verify(draft, own, new):
    assert verify(draft, own) == new


def test_verify_wants_one_token_more_than_the_draft():
    with pytest.raises(ValueError, match="own: got 2 tokens, expected 3"):
        verify([1, 2], [1, 2])


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("draft", [None, lookup, oracle, wrong, half, lambda tokens, k: []], ids=lambda f: str(f)[:20])
def test_the_text_does_not_depend_on_the_draft(draft, k):
    run = generate(tiny(), PROMPT, 24, draft, k)
    assert run.tokens == plain()
    assert len(run.tokens) == run.passes + run.accepted  # a pass writes one token of its own
    assert run.computed == len(PROMPT) + run.passes - 1 + run.drafted
    assert 0 <= run.accepted <= run.drafted <= k * run.passes


def test_counts():
    assert generate(tiny(), PROMPT, 24, None) == Run(plain(), 24, 0, 0, 5 + 23)
    all_right = generate(tiny(), PROMPT, 24, oracle, 3)
    assert (all_right.passes, all_right.drafted, all_right.accepted) == (6, 18, 18)
    none_right = generate(tiny(), PROMPT, 24, wrong, 3)
    assert (none_right.passes, none_right.accepted) == (24, 0)
    assert none_right.drafted == 3 * 21 + 2 + 1  # near the end there is room for fewer, at the end for none


def test_a_draft_is_cut_to_what_was_asked_for():
    run = generate(tiny(), PROMPT, 24, lambda tokens, k: oracle(tokens, 10), 2)
    assert run.tokens == plain()
    assert run.drafted <= 2 * run.passes


@pytest.mark.parametrize("draft", [None, oracle, half, wrong])
@pytest.mark.parametrize("at", range(12))
def test_the_text_ends_at_a_stop_token(draft, at):
    """Wherever it stands: inside what was accepted, at its end, or as the model's own token."""
    stop = plain()[at]
    first = plain().index(stop)
    run = generate(tiny(), PROMPT, 24, draft, 5, stop=(stop,))
    assert run.tokens == plain()[: first + 1]
    assert len(run.tokens) == run.passes + run.accepted  # drafted tokens behind the stop are not written


def test_one_token():
    run = generate(tiny(), PROMPT, 1, oracle, 4)
    assert (run.tokens, run.passes, run.drafted) == (plain()[:1], 1, 0)


# ---- the cache


def test_the_cache_gives_what_the_model_gives():
    tokens = PROMPT + plain()
    whole = tiny()(torch.tensor([tokens]))[0]
    cache, got = Cache(tiny(), len(tokens)), []
    for start, end in ((0, 5), (5, 6), (6, 13), (13, 29)):
        got.append(cache.forward(tokens[start:end]))
    torch.testing.assert_close(torch.cat(got), whole)


def test_the_cache_lies_where_the_model_does():
    cache = Cache(copy.deepcopy(tiny()).to("meta"), 9)
    assert {cache.forward(ids).device.type for ids in ([3, 1, 4], [1])} == {"meta"}
    assert {pair.device.type for pair in cache.layers} == {"meta"}


def test_what_was_truncated_leaves_no_trace():
    tokens = PROMPT + plain()
    cache, fresh = Cache(tiny(), 12), Cache(tiny(), 12)
    cache.forward(tokens[:6])
    cache.forward([0, 11, 2, 9])
    cache.truncate(6)
    fresh.forward(tokens[:6])
    assert torch.equal(cache.forward(tokens[6:9]), fresh.forward(tokens[6:9]))
    assert cache.length == 9
    with pytest.raises(ValueError, match="length: got 10, expected 0 to 9"):
        cache.truncate(10)


def test_only_accepted_tokens_stay_in_the_cache(monkeypatch):
    kept, known, truncate = [], [], Cache.truncate

    def draft(tokens, k):
        known.append(len(tokens))
        return half(tokens, k)

    monkeypatch.setattr(Cache, "truncate", lambda self, n: (kept.append(n), truncate(self, n)))
    generate(tiny(), PROMPT, 24, draft, 4)
    assert kept[: len(known) - 1] == [n - 1 for n in known[1:]]  # all but the last token, which has no key yet


# ---- prompt lookup


@pytest.mark.parametrize(
    ("text", "k", "draft"),
    [
        ("abcXabc", 4, "Xabc"),
        ("abcXabc", 1, "X"),
        ("abc1abc2abc", 2, "2a"),  # the latest place
        ("abc1bc2abc", 1, "1"),  # but a longer match first
        ("aaaa", 3, "a"),
        ("abcdef", 4, ""),
        ("Xab", 4, ""),
        ("a", 4, ""),
        ("", 4, ""),
        ("1a2a", 4, ""),  # one token is no match
    ],
)
def test_lookup(text, k, draft):
    assert "".join(lookup(list(text), k)) == draft


def test_lookup_looks_at_no_more_than_the_longest():
    assert "".join(lookup(list("xabc1yabc2xabc"), 1)) == "1"
    assert "".join(lookup(list("xabc1yabc2xabc"), 1, longest=3)) == "2"


def test_bad_arguments():
    with pytest.raises(ValueError, match="prompt"):
        generate(tiny(), [], 3)
    for length, k in ((0, 4), (3, -1)):
        with pytest.raises(ValueError, match="max_new_tokens, k"):
            generate(tiny(), PROMPT, length, k=k)


PLANTED_BUGS = [
    ("labkit/speculative.py", "dtype=like.dtype, device=like.device)", "dtype=like.dtype)"),
    ("labkit/speculative.py", "draft[agreed] == own[agreed]", "draft[agreed] in own"),
    ("labkit/speculative.py", "return list(own[: agreed + 1])", "return list(own[: max(1, agreed)])"),
    ("labkit/speculative.py", "cache.truncate(len(tokens) - 1)", "pass"),
    ("labkit/speculative.py", "tokens += new[: last + 1]", "tokens += new"),
    ("labkit/speculative.py", "end - len(tokens) - 1)", "end - len(tokens))"),
    ("labkit/speculative.py", "(draft(tokens, room))[:room]", "(draft(tokens, room))"),
    ("labkit/speculative.py", "torch.arange(self.length, end", "torch.arange(end - self.length"),
    ("labkit/speculative.py", "range(len(tokens) - n - 1, -1, -1)", "range(len(tokens) - n)"),
    (
        "labkit/speculative.py",
        "for n in range(min(longest, len(tokens) - 1), shortest - 1, -1)",
        "for n in range(2, 3)",
    ),
    ("labkit/speculative.py", "run.accepted += last ", "run.accepted += len(new) - 1 "),
    ("labkit/speculative.py", "run.accepted += last ", "run.accepted += last + 1 "),
]
