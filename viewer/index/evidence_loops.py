"""The loops of `evidence`, compiled by numba: sorting by latent, counts, examples, drivers, co-firing.

Each works on a range of latents, several at a time. `starts`, `row` and `activation` are a site's `Firings`.
Every sum runs over a latent's own firings in the order of the rows, so nothing depends on threads or ranges.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sae.kernels.compiled import compiled

# a window of so many tokens either side of the peak tells whether two examples are the same text
_NEAR = 5
# scores looked at together; only a span that holds a new one is looked at one by one
_SPAN = 128
# rows whose latents are asked for before they are counted: the time of so many is what memory takes to answer
_AHEAD = 8
# latents in a line of a processor's cache, roughly
_LINE = 32
# words of bits taken together, and latents whose counts meanwhile stay in the cache
WORDS = 4
_LATENTS = 2048


@compiled
def sort_by_latent(row_starts, latent, activation, first, row, by_latent):
    """Puts firings in the order of rows, as lists a row, into the order of latents and then rows.

    `first` [latent] says where each latent's firings begin in the outputs `row` and `by_latent`; it is used
    up.
    """
    for r in range(len(row_starts) - 1):
        for k in range(row_starts[r], row_starts[r + 1]):
            place = first[latent[k]]
            first[latent[k]] = place + 1
            row[place] = r
            by_latent[place] = activation[k]


@compiled
def count_activations(begin, end, starts, activation, bins, total, maximum, histogram):
    """Sum (float64), maximum and histogram of each latent's activations.

    `bins` has those of the firings of this range alone.
    """
    for j in range(begin, end):
        for k in range(starts[j], starts[j + 1]):
            total[j] += activation[k]
            maximum[j] = max(maximum[j], activation[k])
            histogram[j, bins[k - starts[begin]]] += 1


@compiled
def choose_examples(
    begin, end, starts, row, activation, bits, unit, place, tokens, document, position, edges,
    top, top_found, banded, banded_found, keys,
):  # fmt: skip
    """The best examples of each latent, and a random few of each of its bands.

    An example is the hardest firing in a unit (a document within a block), the earliest of equals. Of
    several with the same tokens around them the best alone counts. `top` [latent, count] and `banded`
    [latent, band, count] get rows, and `*_found` how many. `edges` [latent, band] are the bands' lower
    edges, falling. `bits` are the activations' own as integers, which order as they do. `unit` and `place`
    are by row; `tokens`, `document` and `position` [block, pos]; `keys` [count] is room to work in.
    """
    n_bands = edges.shape[1]
    keys_top, keys_band = keys[0, : top.shape[1]], keys[1:, : banded.shape[2]]
    for j in range(begin, end):
        k, last = starts[j], starts[j + 1]
        while k < last:
            best, here = k, unit[row[k]]
            k += 1
            while k < last and unit[row[k]] == here:
                if activation[k] > activation[best]:
                    best = k
                k += 1
            new, at = row[best], place[row[best]]
            key = np.uint64(0x7FFFFFFF - bits[best])
            top_found[j] = _offer(key, new, keys_top, top[j], top_found[j], place, tokens, document, position)
            band = 0
            while band < n_bands - 1 and activation[best] <= edges[j, band]:
                band += 1
            block, pos = at // tokens.shape[1], at % tokens.shape[1]
            key = scramble(j, document[block, pos], position[block, pos])
            banded_found[j, band] = _offer(
                key, new, keys_band[band], banded[j, band], banded_found[j, band],
                place, tokens, document, position,
            )  # fmt: skip


@compiled
def scramble(latent, document, position):
    """A number that looks random, from three (the finaliser of splitmix64, once for each)."""
    x = np.uint64(0)
    for word in (np.uint64(latent), np.uint64(document), np.uint64(position)):
        x = (x ^ word) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


@compiled
def _offer(key, new, keys, rows, found, place, tokens, document, position):
    """Lets a row into a list of rows with the smallest keys; returns how many it then holds."""
    if found == len(rows) and not _before(key, new, keys[-1], rows[-1], place, document, position):
        return found
    free = found
    for i in range(found):
        if _same_text(place[new], place[rows[i]], tokens, document):
            if not _before(key, new, keys[i], rows[i], place, document, position):
                return found
            free = i
            break
    if free == found:
        if found == len(rows):
            free = found - 1
        else:
            found += 1
    while free > 0 and _before(key, new, keys[free - 1], rows[free - 1], place, document, position):
        keys[free], rows[free] = keys[free - 1], rows[free - 1]
        free -= 1
    keys[free], rows[free] = key, new
    return found


@compiled
def _before(key, row, other_key, other, place, document, position):
    """Whether a row comes before another: by key, then document, position in it, and row."""
    if key != other_key:
        return key < other_key
    context = document.shape[1]
    a, b = place[row], place[other]
    one, two = document[a // context, a % context], document[b // context, b % context]
    if one != two:
        return one < two
    one, two = position[a // context, a % context], position[b // context, b % context]
    if one != two:
        return one < two
    return row < other


@compiled
def _same_text(a, b, tokens, document):
    """Whether the tokens around two places, within their documents, are the same."""
    context = tokens.shape[1]
    block_a, at_a, block_b, at_b = a // context, a % context, b // context, b % context
    if tokens[block_a, at_a] != tokens[block_b, at_b]:
        return False
    for step in range(-_NEAR, _NEAR + 1):
        p, q = at_a + step, at_b + step
        in_a = 0 <= p < context and document[block_a, p] == document[block_a, at_a]
        in_b = 0 <= q < context and document[block_b, q] == document[block_b, at_b]
        if in_a != in_b or (in_a and tokens[block_a, p] != tokens[block_b, q]):
            return False
    return True


@compiled
def find_activations(latent, row, starts, rows, activation, found):
    """The activation of each latent on the row beside it, on which it fires; `rows` are the firings'."""
    for i in range(len(latent)):
        low, high = starts[latent[i]], starts[latent[i] + 1]
        while high - low > 1:
            middle = (low + high) // 2
            if rows[middle] <= row[i]:
                low = middle
            else:
                high = middle
        found[i] = activation[low]


@compiled
def find_drivers(
    begin, end, starts, row, activation, token, token_rows, at_least,
    by_share, by_lift, counts, sums, count, total, touched, values,
):  # fmt: skip
    """The tokens that drive each latent, by their share of its activation and by lift.

    `token` is each row's, numbered from 0 in rising order; `token_rows` on how many rows each is. `by_share`
    and `by_lift` [latent, rank] get tokens, -1 where there is none, and `counts` and `sums` [latent, order,
    rank] the firings on them and their activation. By lift only tokens with `at_least` firings. `count`,
    `total` (both zero), `touched` [token] and `values` [rank] are room to work in.
    """
    for j in range(begin, end):
        n = 0
        for k in range(starts[j], starts[j + 1]):
            t = token[row[k]]
            if count[t] == 0:
                touched[n] = t
                n += 1
            count[t] += 1
            total[t] += activation[k]
        values[:] = -1.0
        for i in range(n):
            _rank(total[touched[i]], touched[i], values, by_share[j])
        values[:] = -1.0
        for i in range(n):
            t = touched[i]
            if count[t] >= at_least:
                # the factors that all tokens share do not change the order
                _rank(count[t] / token_rows[t], t, values, by_lift[j])
        for rank in range(by_share.shape[1]):
            for order, chosen in enumerate((by_share[j, rank], by_lift[j, rank])):
                if chosen >= 0:
                    counts[j, order, rank] = count[chosen]
                    sums[j, order, rank] = total[chosen]
        for i in range(n):
            count[touched[i]] = 0
            total[touched[i]] = 0


@compiled
def _rank(value, which, values, chosen):
    """Lets `which` into a list of those with the highest values; of equals the smaller number comes first."""
    last = len(values) - 1
    if value < values[last] or (value == values[last] and which > chosen[last]):
        return
    i = last
    while i > 0 and (value > values[i - 1] or (value == values[i - 1] and which < chosen[i - 1])):
        values[i], chosen[i] = values[i - 1], chosen[i - 1]
        i -= 1
    values[i], chosen[i] = value, which


@compiled
def _rank_all(score, values, chosen):
    """Lets all latents with a positive score into an empty list of those with the highest."""
    for first in range(0, len(score), _SPAN):
        part = score[first : first + _SPAN]
        beyond = np.int32(0)
        for i in range(len(part)):
            beyond += np.int32((part[i] > 0) & (part[i] >= values[-1]))
        if beyond == 0:
            continue
        for i in range(len(part)):
            if part[i] > 0:
                _rank(part[i], first + i, values, chosen)


@intrinsic
def _ask_for(_context, array, place):
    """Asks memory for what stands at a place of an array, which may lie beyond its end, without waiting."""

    def build(context, builder, signature, arguments):
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        there = builder.bitcast(builder.gep(held.data, [arguments[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.globals.get("llvm.prefetch.p0i8")
        function = function or ir.Function(builder.module, kind, "llvm.prefetch.p0i8")
        # to be read, by this core, again soon, as data
        builder.call(function, [there, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), build


@intrinsic
def _ones(_context, bits):
    """How many bits are set."""

    def build(_, builder, _signature, arguments):
        return builder.ctpop(arguments[0])

    return bits(bits), build


@compiled
def set_bits(rows, row_starts, latent, bits):
    """Sets bit n % 32 of `bits[n // 32]` [latent] for the latents that fire on the nth of some rows."""
    for n in range(len(rows)):
        bit = np.uint32(1) << np.uint32(n % 32)
        for m in range(row_starts[rows[n]], row_starts[rows[n] + 1]):
            bits[n // 32, latent[m]] |= bit


@compiled
def _add_common_bits(bits, first, counts):
    """Adds to `counts[n]` [latent] the bits that each latent has in common with latent first + n."""
    for start in range(0, bits.shape[1], _LATENTS):
        span = slice(start, start + _LATENTS)
        for w in range(0, len(bits), WORDS):
            # one by one: of a slice of several rows numba does not know that it is dense: no vectors
            a, b, c, d = bits[w, span], bits[w + 1, span], bits[w + 2, span], bits[w + 3, span]
            for n in range(len(counts)):
                own, count = bits[w : w + WORDS, first + n], counts[n, span]
                own_a, own_b, own_c, own_d = own[0], own[1], own[2], own[3]
                for i in range(len(count)):
                    common = _ones(own_a & a[i]) + _ones(own_b & b[i])  # pyright: ignore[reportCallIssue]
                    common += _ones(own_c & c[i]) + _ones(own_d & d[i])  # pyright: ignore[reportCallIssue]
                    count[i] += np.int32(common)


@compiled
def _add_common_rows(first, last, row, row_starts, row_ends, latent, count):
    """Adds to `count` how often each latent fires on the rows of some firings."""
    for k in range(first, last):
        coming = row[min(k + _AHEAD, last - 1)]
        _ask_for(latent, row_starts[coming])  # pyright: ignore[reportCallIssue]
        _ask_for(latent, row_starts[coming] + _LINE)  # pyright: ignore[reportCallIssue]
        _ask_for(row_starts, np.int64(row[min(k + 2 * _AHEAD, last - 1)]))  # pyright: ignore[reportCallIssue]
        for other in latent[row_starts[row[k]] : row_ends[row[k]]]:
            # of an unsigned number numba does not ask whether it counts from the end
            count[np.uint64(other)] += np.int32(1)


@compiled
def find_cofiring(
    begin, end, starts, row, row_starts, row_ends, latent, bits, spread, n_rows, at_least,
    others, phi, together, counts, score, values,
):  # fmt: skip
    """The latents that fire with each one, by phi, the correlation of firing with firing.

    Firings as lists a row are `latent` from `row_starts` to `row_ends`; those of crowded rows are in `bits`
    (`set_bits`) instead. `spread` is 1 / sqrt(f (n_rows - f)) for each latent of f firings, and 0 where that
    has no meaning. Only those that share `at_least` rows and have a positive phi. `others` [latent, rank]
    gets latents, -1 where there is none, `phi` and `together` their phi and shared rows. `counts` (zero)
    [some, latent], `score` [latent] and `values` [rank] are room to work in.
    """
    for first in range(begin, end, len(counts)):
        some = min(len(counts), end - first)
        _add_common_bits(bits, first, counts[:some])
        for n in range(some):
            j, count = first + n, counts[n]
            firings = starts[j + 1] - starts[j]
            if firings >= at_least:
                _add_common_rows(starts[j], starts[j + 1], row, row_starts, row_ends, latent, count)
                values[:] = 0.0
                count[j] = 0
                # of nearly all pairs: without a branch, so that it is made of vectors
                for i in range(len(count)):
                    expected = np.float64(firings) * np.float64(starts[i + 1] - starts[i])
                    value = (np.float64(n_rows) * np.float64(count[i]) - expected) * spread[i] * spread[j]
                    score[i] = value if count[i] >= at_least else 0.0
                _rank_all(score, values, others[j])
                for rank in range(len(values)):
                    if others[j, rank] >= 0:
                        phi[j, rank] = values[rank]
                        together[j, rank] = count[others[j, rank]]
            count[:] = 0
