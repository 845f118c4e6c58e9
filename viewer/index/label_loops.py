"""The loops of the automatic labels, compiled by numba: sums of activation by what a text is sorted into."""

import numpy as np

from sae.kernels.compiled import compiled

# bits, far more than a logarithm is wrong by
_ROUNDING = 1e-6


@compiled
def sum_by_key(starts, row, activation, key, document, share, first, best, mass, count, several):
    """For some latents, the keys that tell most of where their activation lies.

    Firings are those of `Firings`; `key` [row] is -1 where it is nothing, and `share` [key] is that of all
    rows. A key that holds q of a latent's activation and p of all rows is ranked by q log2(q / p). For
    latent first + i, `best[i]`, `mass[i]` and `count[i]` [rank] take the keys, the activation on them and
    the firings, and `several[i]` whether the first key's are in two documents at least. Keys that are not
    there are -1.
    """
    n_keys, ranks = len(share), best.shape[1]
    # side by side, so that a firing touches one place
    held = np.zeros((n_keys, 2))
    touched = np.zeros(n_keys + 1, np.int64)
    told = np.zeros(ranks)
    # no key tells more than if all activation lay on it; most need no logarithm then
    bits = np.log2(1 / share) + _ROUNDING
    for i in range(len(best)):
        begin, end = starts[first + i], starts[first + i + 1]
        n_touched, everything = 0, 0.0
        for f in range(begin, end):
            everything += activation[f]
            k = key[row[f]]
            if k < 0:
                continue
            times = held[k, 0]
            # written whether it is new or not: what a guess would get wrong costs more
            touched[n_touched] = k
            n_touched += times == 0
            held[k, 0] = times + 1
            held[k, 1] += activation[f]
        told[:] = 0
        for t in range(n_touched):
            k = touched[t]
            q = held[k, 1] / everything
            if q * bits[k] > told[ranks - 1]:
                value, times = q * np.log2(q / share[k]), np.int64(held[k, 0])
                _insert_key(k, value, held[k, 1], times, told, best[i], mass[i], count[i])
        several[i] = best[i, 0] >= 0 and _in_several(begin, end, row, key, document, best[i, 0])
        for t in range(n_touched):
            held[touched[t]] = 0


@compiled
def _in_several(begin, end, row, key, document, wanted):
    """Whether the firings on a key, which there are, are in two documents at least."""
    met, there = False, document[0]
    for f in range(begin, end):
        if key[row[f]] == wanted:
            if met and document[row[f]] != there:
                return True
            met, there = True, document[row[f]]
    return False


@compiled
def _insert_key(key, value, key_mass, key_count, told, best, mass, count):
    r = len(told)
    # of equal ones the smaller key first, whatever order they were met in
    while r > 0 and (value > told[r - 1] or (value == told[r - 1] and 0 <= key < best[r - 1])):
        r -= 1
    for s in range(len(told) - 1, r, -1):
        told[s], best[s], mass[s], count[s] = told[s - 1], best[s - 1], mass[s - 1], count[s - 1]
    if r < len(told):
        told[r], best[r], mass[r], count[r] = value, key, key_mass, key_count


@compiled
def sum_on_sets(starts, row, activation, key, document, sets, n_keys, mass, count, several):
    """As `sum_by_key`, for one set of keys a latent, [latent, some] with -1 for none: all together."""
    mark = np.full(n_keys, -1)
    for i in range(len(sets)):
        for k in sets[i]:
            if k >= 0:
                mark[k] = i
        met = np.int64(-1)
        for f in range(starts[i], starts[i + 1]):
            k = key[row[f]]
            if k >= 0 and mark[k] == i:
                mass[i] += activation[f]
                count[i] += 1
                if met < 0:
                    met = document[row[f]]
                several[i] |= document[row[f]] != met


@compiled
def mark_above(starts, activation, least, kept, counts):
    """For some latents, which of their firings are above `least` [latent], and how many of each.

    `starts` is their part of that of `Firings`; `kept` bool [firing], of all firings, takes the first and
    `counts` int64 [latent] the second.
    """
    for i in range(len(least)):
        number = 0
        for f in range(starts[i], starts[i + 1]):
            above = activation[f] > least[i]
            kept[f] = above
            number += above
        counts[i] = number


@compiled
def list_near(word, document, near, counts):
    """Lists the words at each row and before it in its document, as far back as `near` [row, some] has room.

    Each stands there once, with -1 behind the last; `counts` [word] takes how many rows each is near.
    """
    stamp = np.full(len(counts), -1)
    near[:] = -1
    for r in range(len(word)):
        n = 0
        for before in range(r, max(-1, r - near.shape[1]), -1):
            if document[before] != document[r]:
                break
            w = word[before]
            if w >= 0 and stamp[w] != r:
                stamp[w] = r
                counts[w] += 1
                near[r, n] = w
                n += 1


@compiled
def cover_near(starts, row, activation, near, document, share, first, most, chosen, covered, docs):
    """Words that stand near much of a latent's activation, found one after the other.

    `near` [row, some] is of `list_near`. Of latent first + n at most `most` firings are looked at, spread
    evenly. In documents of even number that word is chosen whose nearness sets the firings most apart from
    all rows, of which `share` [word] have it near; then the same among the firings that are left. In
    documents of odd number it is seen how far that goes: `covered[n]` [rank] takes the share of the
    activation there that is near the words so far, and `docs[n]` [rank] the documents that this is in.
    `chosen[n]` [rank] takes the words, -1 for none.
    """
    mass, touched = np.zeros(len(share)), np.zeros(len(share), np.int64)
    for n in range(len(chosen)):
        begin, end = starts[first + n], starts[first + n + 1]
        step = max(1, (end - begin + most - 1) // most)
        left = np.ones((end - begin + step - 1) // step, np.bool_)
        even, odd = 0.0, 0.0
        for s in range(len(left)):
            if document[row[begin + s * step]] % 2:
                odd += activation[begin + s * step]
            else:
                even += activation[begin + s * step]
        for rank in range(chosen.shape[1]):
            n_touched = 0
            for s in range(len(left)):
                f = begin + s * step
                if left[s] and document[row[f]] % 2 == 0:
                    n_touched = _add_near(near[row[f]], activation[f], mass, touched, n_touched)
            choice = _most_telling(touched[:n_touched], mass, even, share)
            chosen[n, rank] = choice
            if choice >= 0:
                taken = _take_near(row, activation, near, document, begin, step, left, choice)
                covered[n, rank], docs[n, rank] = taken[0] / max(odd, 1e-300), taken[1]
            if rank:
                covered[n, rank] += covered[n, rank - 1]
                docs[n, rank] += docs[n, rank - 1]


@compiled
def _add_near(words, value, mass, touched, n_touched):
    """Adds a firing to every word near it; returns how many words have something."""
    for w in words:
        if w < 0:
            break
        if mass[w] == 0:
            touched[n_touched] = w
            n_touched += 1
        mass[w] += value
    return n_touched


@compiled
def _most_telling(keys, mass, everything, share):
    """The key with the largest q log2(q / p), -1 for none above 0; empties `mass` again."""
    choice, most = -1, 0.0
    for k in keys:
        q = mass[k] / everything
        told = q * np.log2(q / share[k])
        if told > most or (told == most and k < choice):
            choice, most = k, told
        mass[k] = 0
    return choice


@compiled
def _take_near(row, activation, near, document, begin, step, left, choice):
    """Takes the firings near a word out of those left; activation and documents of those in odd documents."""
    taken, documents, last = 0.0, 0, np.int64(-1)
    for s in range(len(left)):
        r = row[begin + s * step]
        if left[s] and _holds(near[r], choice):
            left[s] = False
            if document[r] % 2:
                taken += activation[begin + s * step]
                documents += document[r] != last
                last = document[r]
    return taken, documents


@compiled
def _holds(words, wanted):
    for w in words:
        if w == wanted:
            return True
        if w < 0:
            break
    return False
