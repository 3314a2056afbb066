"""A pool of KV pages: block tables, copy-on-write and prefix caching, with no tensor in sight.

Keys and values live in fixed pages of `page_size` tokens. A sequence owns a block table: entry i is the page of its
tokens [i * page_size, (i + 1) * page_size). Pages are taken as tokens come, so at most page_size - 1 slots of a
sequence are unused (Kwon et al., SOSP 2023, section 4).

Sequences may share pages. A page that two hold is copied before one of them writes to it (`fork`, section 4.4). A full
page keeps the hash of all tokens up to its end, also after its last holder has gone, so that a prompt that begins with
the same tokens finds it (prefix caching). Free pages wait in a queue: the one unused for longest is reused first.

    refs[page] == 0  <=>  page waits in the free queue, perhaps still with a hash
    refs[page] >= 1  ==>  page stands in that many block tables, and nowhere in the queue
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass

from labkit import args

_ROOT = bytes(32)  # the hash before the first page


class OutOfPages(RuntimeError):
    """The pool has too few free pages for the call. Nothing was changed."""


@dataclass
class _Sequence:
    tokens: array  # of int64
    table: list[int]  # pages, exactly ceil(len(tokens) / page_size) of them
    hashes: list[bytes]  # of its full pages, as far as they were published

    def copy(self) -> "_Sequence":
        return _Sequence(self.tokens[:], self.table[:], self.hashes[:])


class BlockPool:
    """Hands out `num_pages` pages of `page_size` tokens each. A call that fails changes nothing.

    watermark: share of the pages that `allocate` leaves free, so that running sequences can grow (vLLM: 0.01).
    prefix_caching=False: no page is ever found again.
    Misuse (an unknown or repeated id, freeing twice) raises ValueError naming the argument.
    """

    def __init__(self, num_pages, page_size, *, watermark=0.0, prefix_caching=True):
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            args.expect(isinstance(value, int) and value >= 1, name, value, "an int >= 1")
        args.expect(0 <= watermark < 1, "watermark", watermark, "a share from 0 to below 1")
        self.num_pages, self.page_size, self.prefix_caching = num_pages, page_size, prefix_caching
        self.reserve = int(watermark * num_pages)  # pages
        self._sequences: dict[object, _Sequence] = {}
        self._refs = [0] * num_pages
        self._free = OrderedDict.fromkeys(range(num_pages))  # first: next to be reused
        self._page_of: dict[bytes, int] = {}  # hash -> page
        self._hash_of: dict[int, bytes] = {}  # page -> hash, the same pairs

    # ---- the sequences

    def allocate(self, seq_id, token_ids, *, publish=True) -> int:
        """Begin a sequence with a prompt, which may be empty. Returns how many of its first tokens are cached.

        Cached tokens are whole pages that hold the same tokens after the same beginning; their keys and values need
        not be computed. The last token never counts among them: its output is needed.
        publish=False: its new pages are not to be found before `publish`, or the first `append`, says that they were
        computed. Raises OutOfPages.
        """
        self._expect_unused("seq_id", seq_id)
        tokens = _tokens("token_ids", token_ids)
        hits, hashes = self._find(tokens)
        missing = -(-len(tokens) // self.page_size) - len(hits)
        leaving = missing + sum(self._refs[page] == 0 for page in hits)  # a free page that is hit leaves the queue too
        if leaving > self.num_free - self.reserve:
            kept = f" of which {self.reserve} are kept" if self.reserve else ""
            raise OutOfPages(f"allocate({seq_id!r}): needs {leaving} free pages, there are {self.num_free}{kept}")
        for page in hits:  # first, or the next line could take them
            self._hold(page)
        sequence = _Sequence(tokens, hits + [self._take() for _ in range(missing)], hashes)
        self._sequences[seq_id] = sequence
        if publish:
            self._publish(sequence, len(tokens))
        return len(hits) * self.page_size

    def append(self, seq_id, token_id) -> list[tuple[int, int]]:
        """Add a token. Returns the page copies (src, dst) that must be made before its keys and values are written.

        Raises OutOfPages.
        """
        sequence = self._get("seq_id", seq_id)
        (token,) = _tokens("token_id", [token_id])
        full = len(sequence.tokens) % self.page_size == 0
        shared = not full and self._refs[sequence.table[-1]] > 1
        if (full or shared) and not self._free:
            raise OutOfPages(f"append({seq_id!r}): needs a free page, there is none")
        copies = []
        if full:
            sequence.table.append(self._take())
        elif shared:  # copy on write; the last holder writes in place
            src, dst = sequence.table[-1], self._take()
            self._refs[src] -= 1
            sequence.table[-1] = dst
            copies.append((src, dst))
        sequence.tokens.append(token)
        self._publish(sequence, len(sequence.tokens))
        return copies

    def fork(self, parent_id, child_id) -> None:
        """Begin a sequence with the tokens and pages of another. Takes no page."""
        parent = self._get("parent_id", parent_id)
        self._expect_unused("child_id", child_id)
        self._sequences[child_id] = parent.copy()
        for page in parent.table:
            self._hold(page)

    def free(self, seq_id) -> None:
        """End a sequence. Pages that nobody holds any more join the queue, the last one first: the beginning of a
        sequence is the part that others are most likely to share, so it should live longest."""
        sequence = self._get("seq_id", seq_id)
        del self._sequences[seq_id]
        for page in reversed(sequence.table):
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free[page] = None

    def publish(self, seq_id, num_tokens) -> None:
        """The keys and values of the first num_tokens tokens are in their pages: others may find the full ones."""
        sequence = self._get("seq_id", seq_id)
        ok = isinstance(num_tokens, int) and 0 <= num_tokens <= len(sequence.tokens)
        args.expect(ok, "num_tokens", num_tokens, f"an int from 0 to {len(sequence.tokens)}")
        self._publish(sequence, num_tokens)

    def forget_prefixes(self) -> None:
        """Nothing is cached any more: no page that holds tokens now will be found again."""
        self._page_of.clear()
        self._hash_of.clear()

    # ---- what is where

    def table(self, seq_id) -> list[int]:
        """The pages of a sequence, in order."""
        return self._get("seq_id", seq_id).table[:]

    def num_tokens(self, seq_id) -> int:
        return len(self._get("seq_id", seq_id).tokens)

    def slots(self, seq_id, start=0, stop=None) -> list[int]:
        """Where tokens [start, stop) of a sequence are stored: page * page_size + offset, as `write_kv` takes it."""
        sequence = self._get("seq_id", seq_id)
        size, positions = self.page_size, range(len(sequence.tokens))[start:stop]
        return [sequence.table[i // size] * size + i % size for i in positions]

    @property
    def seq_ids(self) -> list:
        return list(self._sequences)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds. Cached ones count: they are given up when they are needed."""
        return len(self._free)

    @property
    def free_queue(self) -> list[int]:
        """Free pages, the next one to be reused first."""
        return list(self._free)

    @property
    def ref_counts(self) -> list[int]:
        """How many sequences hold each page."""
        return self._refs[:]

    @property
    def cached_pages(self) -> set[int]:
        """Pages that a new prompt can find, held or not."""
        return set(self._hash_of)

    def check(self) -> None:
        """Prove that no page is lost or owned twice, and that shared pages hold the same tokens.

        Raises RuntimeError with the numbers.
        """
        size, content = self.page_size, {}
        for seq_id, s in self._sequences.items():
            count = len(s.tokens)
            _prove(len(s.table) == -(-count // size), f"{seq_id!r}: {len(s.table)} pages for {count} tokens")
            _prove(len(set(s.table)) == len(s.table), f"{seq_id!r}: a page twice in {s.table}")
            chain = list(self._chain(s.tokens))
            _prove(s.hashes == chain[: len(s.hashes)], f"{seq_id!r}: hashes of other tokens")
            rest = hashlib.sha256(b"".join(chain[-1:]) + s.tokens[len(chain) * size :].tobytes()).digest()
            for page, digest in zip(s.table, [*chain, rest]):
                _prove(content.setdefault(page, digest) == digest, f"page {page}: other tokens for {seq_id!r}")
                _prove(self._hash_of.get(page, digest) == digest, f"page {page}: the hash of other tokens")
        held = Counter(page for s in self._sequences.values() for page in s.table)
        for page, refs in enumerate(self._refs):
            _prove(refs == held[page], f"page {page}: {refs} references, {held[page]} holders")
            _prove((refs == 0) == (page in self._free), f"page {page}: {refs} references, free: {page in self._free}")
        _prove(set(held) | set(self._free) == set(range(self.num_pages)), "a page that does not exist")
        _prove(self._page_of == {h: page for page, h in self._hash_of.items()}, "hashes and pages do not match")
        _prove(len(self._page_of) == len(self._hash_of), "two pages with one hash")

    # ---- inside

    def _get(self, name, seq_id) -> _Sequence:
        if seq_id not in self._sequences:  # asked first: repr may cost more than the call
            args.expect(False, name, repr(seq_id), "the id of a sequence in the pool")
        return self._sequences[seq_id]

    def _expect_unused(self, name, seq_id) -> None:
        if seq_id in self._sequences:
            args.expect(False, name, repr(seq_id), "an id that is not in use")

    def _chain(self, tokens, known=()):
        """The hash of every full page: SHA-256 over the hash of the page before it and its own tokens.

        So equal hashes mean equal tokens from the very first on. A weaker hash would let one user read another's
        pages. known: the first hashes, if they were computed before.
        """
        yield from known
        last = known[-1] if known else _ROOT
        for start in range(len(known) * self.page_size, len(tokens) - self.page_size + 1, self.page_size):
            last = hashlib.sha256(last + tokens[start : start + self.page_size].tobytes()).digest()
            yield last

    def _find(self, tokens) -> tuple[list[int], list[bytes]]:
        """Cached pages at the beginning of tokens, and their hashes; never the page of the last token."""
        pages, hashes = [], []
        if self.prefix_caching:
            for digest in self._chain(tokens[:-1]):
                if digest not in self._page_of:
                    break
                pages.append(self._page_of[digest])
                hashes.append(digest)
        return pages, hashes

    def _publish(self, sequence, num_tokens) -> None:
        if not self.prefix_caching or num_tokens // self.page_size <= len(sequence.hashes):
            return
        known = len(sequence.hashes)
        sequence.hashes = list(self._chain(sequence.tokens[:num_tokens], sequence.hashes))
        for page, digest in zip(sequence.table[known:], sequence.hashes[known:]):
            if digest not in self._page_of:  # a second page with the same tokens stays private: tables never change
                self._page_of[digest] = page
                self._hash_of[page] = digest

    def _hold(self, page) -> None:
        self._refs[page] += 1
        self._free.pop(page, None)

    def _take(self) -> int:
        """The free page unused for longest; what it held is forgotten."""
        page, _ = self._free.popitem(last=False)
        self._page_of.pop(self._hash_of.pop(page, None), None)
        self._refs[page] = 1
        return page


def _tokens(name, token_ids) -> array:
    try:
        return array("q", iter(token_ids))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{name}: got {str(token_ids)[:80]} ({error}), expected 64-bit integers") from None


def _prove(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"BlockPool is broken: {what}")
