"""Every merge method in plain numpy, float64, as the papers write it: the oracle of the merge tests.

Pruned tasks are dropped from the list, ``B_i A_i`` is formed, and nothing is clever. ``test_golden.py`` holds
it to the golden file, which was checked against the PyTorch reference.
"""

import math
from collections.abc import Sequence

import numpy as np

Factors = Sequence[tuple[np.ndarray, np.ndarray]]  # (A [r, in], B [out, r]) of each kept task


def merged(
    tasks: Factors, method: str, space: str = "full", isotropize: bool = False, drops=None, **hyper
) -> np.ndarray:
    """The merged delta [out, in] of the kept tasks; ``drops(shape)`` gives each task's 0 or 1 of DARE.

    ``drops(shape, uniform=True)``: the uniform numbers of DELLA.
    """
    if not tasks:
        raise ValueError("no tasks: the delta is zero")
    a, b = [np.asarray(x, np.float64) for x, _ in tasks], [np.asarray(y, np.float64) for _, y in tasks]
    deltas = [y @ x for x, y in zip(a, b)]
    ranks = [x.shape[0] for x in a]
    if method == "lego":
        whole = lego(a, b, **hyper)
    elif method == "iso_cts":
        whole = iso_cts(deltas, ranks, **hyper)
    elif method == "pico":
        whole = pico(b, deltas)
    elif method == "compress":
        whole = compress(deltas, **hyper)
    elif method == "do_merging":
        whole = do_merging(a, b, **hyper)
    else:
        left, mats, right = in_space(space, a, b, deltas)
        if method == "della":
            mats = [magprune(m, bits, **hyper) for m, bits in zip(mats, drops(mats[0].shape, uniform=True))]
        if method.startswith("dare"):
            keep = drops(mats[0].shape)
            mats = [m * k / (1 - hyper["drop_rate"]) for m, k in zip(mats, keep)]
        whole = left @ COMBINE[method](mats, ranks, **hyper) @ right
    return isotropic(whole) if isotropize or method == "iso" else whole


def in_space(space, a, b, deltas):
    out, inner = deltas[0].shape
    if space == "full":
        return np.eye(out), deltas, np.eye(inner)
    if space == "knots":
        u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
        valid = s > 1e-5
        return u[:, valid] * s[valid], np.split(vt[valid], len(deltas), axis=1), np.eye(inner)
    left = np.linalg.svd(np.concatenate(b, axis=1), full_matrices=False)[0]
    right = np.linalg.svd(np.concatenate(a), full_matrices=False)[2]
    return left, [left.T @ d @ right.T for d in deltas], right


def ties(mats, ranks, density, drop_rate=0):
    trimmed = []
    for m in mats:
        size = np.sort(np.abs(m).ravel())
        kth = size[max(m.size - int(m.size * density), 1) - 1]
        trimmed.append(np.where(np.abs(m) >= kth, m, 0))
    sums = np.sum(trimmed, axis=0)
    signs = np.sign(sums)
    signs[signs == 0] = np.sign(signs.sum())
    agree = [np.where(np.where(signs > 0, m > 0, m < 0), m, 0) for m in trimmed]
    count = np.sum([m != 0 for m in agree], axis=0)
    return np.sum(agree, axis=0) / np.maximum(count, 1)


def breadcrumbs(mats, ranks, density, gamma):
    total = np.zeros_like(mats[0])
    for m in mats:
        order = np.argsort(-np.abs(m).ravel(), kind="stable")
        top = int(m.size * gamma)
        chosen = order[top : top + int(m.size * density)]
        total.ravel()[chosen] += m.ravel()[chosen]
    return total


def tsv(mats, ranks):
    parts = [np.linalg.svd(m, full_matrices=False) for m in mats]
    u = np.concatenate([u[:, :r] for (u, _, _), r in zip(parts, ranks)], axis=1)
    s = np.concatenate([s[:r] for (_, s, _), r in zip(parts, ranks)])
    v = np.concatenate([vt[:r].T for (_, _, vt), r in zip(parts, ranks)], axis=1)
    return (polar(u) * s) @ polar(v).T


def cart(mats, ranks, rank_fraction, coefficient):
    average = np.mean(mats, axis=0)
    k = math.ceil(rank_fraction * min(average.shape))
    total = average.copy()
    for m in mats:
        u, s, vt = np.linalg.svd(m - average, full_matrices=False)
        total += coefficient * (u[:, :k] * s[:k]) @ vt[:k]
    return total


def polar(matrix, cut=1e-9):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, s > cut] @ vt[s > cut]


def isotropic(matrix, cut=5e-5):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = s > cut
    return s[kept].mean() * u[:, kept] @ vt[kept] if kept.any() else 0 * matrix


def iso_cts(deltas, ranks, common_fraction):
    total = min(*deltas[0].shape, sum(ranks))
    k = round(common_fraction * total)
    own = (total - k) // len(deltas)
    u, s, vt = np.linalg.svd(sum(deltas), full_matrices=False)
    us, ss, vs = [u[:, :k]], [s[:k]], [vt[:k].T]
    for d, r in zip(deltas, ranks):
        x, y, zt = np.linalg.svd(d - us[0] @ us[0].T @ d, full_matrices=False)
        n = min(own, r, int(np.sum(y > 1e-9)))
        us.append(x[:, :n]), ss.append(y[:n]), vs.append(zt[:n].T)
    sigma = np.concatenate(ss).mean()
    return sigma * polar(np.concatenate(us, axis=1)) @ polar(np.concatenate(vs, axis=1)).T


def lego(a, b, clusters):
    units, halves = [], []
    for x, y in zip(a, b):
        for row, column in zip(x, y.T):
            ratio = np.sqrt(np.linalg.norm(row) / np.linalg.norm(column))
            units.append(np.concatenate([column * ratio, row / ratio]))
    out, units = b[0].shape[0], np.stack(units)
    chosen = [int(np.argmax(np.linalg.norm(units, axis=1)))]
    while len(chosen) < min(clusters, len(units)):
        distance = np.linalg.norm(units[:, None] - units[chosen], axis=2)
        chosen.append(int(np.argmax(np.minimum(distance.min(1), np.linalg.norm(units, axis=1)))))
    centres = units[chosen]
    for _ in range(100):
        member = np.argmin(np.linalg.norm(units[:, None] - centres, axis=2), axis=1)
        centres = np.stack([units[member == c].mean(0) for c in range(len(centres))])
    for c, centre in enumerate(centres):
        length = np.linalg.norm(units[member == c], axis=1).mean()
        halves.append(np.outer(centre[:out], centre[out:]) * (length / np.linalg.norm(centre)) ** 2)
    return np.sum(halves, axis=0) * np.sqrt(np.mean([len(x) for x in a]) / clusters)


def magprune(matrix, uniform, drop_rate, epsilon):
    kept = np.zeros_like(matrix)
    for row, numbers, out in zip(matrix, uniform, kept):
        low, high = drop_rate - epsilon, drop_rate + epsilon
        for k, column in enumerate(np.argsort(np.abs(row))):
            probability = high - (high - low) * k / max(len(row) - 1, 1)
            if numbers[column] < 1 - probability:
                out[column] = row[column] / (1 - probability)
    return kept


def sce(mats, ranks, density):
    spread = np.var(mats, axis=0)
    limit = np.sort(spread.ravel())[-max(int(spread.size * density), 1)]
    chosen = [np.where(spread >= limit, m, 0) for m in mats]
    energy = [np.sum(m**2) for m in chosen]
    agree = [np.sign(m) == np.where(np.sum(chosen, axis=0) >= 0, 1, -1) for m in chosen]
    weights = [e / sum(energy) * g for e, g in zip(energy, agree)]
    total = np.sum(weights, axis=0)
    return np.sum([w * m for w, m in zip(weights, chosen)], axis=0) / np.where(total > 0, total, 1)


def karcher(mats, ranks):
    units = [m.ravel() / np.linalg.norm(m) for m in mats]
    mean = np.mean(units, axis=0)
    mean /= np.linalg.norm(mean)
    for _ in range(10):
        tangent = np.zeros_like(mean)
        for u in units:
            cosine = np.clip(mean @ u, -1, 1)
            angle = np.arccos(cosine)
            if angle > 1e-5:
                tangent += angle / np.sin(angle) * (u - cosine * mean) / len(units)
        size = np.linalg.norm(tangent)
        if size < 1e-5:
            break
        mean = np.cos(size) * mean + np.sin(size) * tangent / size
        mean /= np.linalg.norm(mean)
    return (np.mean([np.linalg.norm(m) for m in mats]) * mean).reshape(mats[0].shape)


def pico(b, deltas):
    u, s, _ = np.linalg.svd(np.concatenate(b, axis=1), full_matrices=False)
    damped = 1 / (1 + (len(b) - 1) * s**2 / np.sum(s**2))
    operator = np.eye(len(u)) + (u * (damped - 1)) @ u.T
    merged = operator @ np.mean(deltas, axis=0)
    return merged * np.mean([np.linalg.norm(d) for d in deltas]) / np.linalg.norm(merged)


def compress(deltas, compressed_rank):
    def leading(matrices):
        return np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)[0][:, :compressed_rank]

    left = leading(deltas)
    right = leading([d.T @ left for d in deltas])
    for _ in range(5):
        left = leading([d @ right for d in deltas])
        right = leading([d.T @ left for d in deltas])
    return left @ left.T @ np.sum(deltas, axis=0) @ right @ right.T


def do_merging(a, b, orthogonal_steps, proximity):
    def less_overlapping(factors):
        """Rows orthogonal to the other tasks' rows, by gradient descent."""
        unit = np.sqrt(np.mean([np.sum(x**2) for x in factors]))
        first = [x / unit for x in factors]
        now = first
        for _ in range(orthogonal_steps):
            moved = []
            for i, x in enumerate(now):
                gradient = proximity * (x - first[i])
                for j, y in enumerate(now):
                    if i != j:
                        gradient = gradient + (x @ y.T) @ y
                moved.append(x - gradient / (2 * len(now) + proximity))
            now = moved
        return [unit * x for x in now]

    deltas = [y.T @ x for x, y in zip(less_overlapping(a), less_overlapping([y.T for y in b]))]
    lengths = [np.linalg.norm(d, axis=0) for d in deltas]
    return np.mean(lengths, axis=0) * np.sum([d / size for d, size in zip(deltas, lengths)], axis=0)


COMBINE = {
    "sum": lambda mats, ranks: np.sum(mats, axis=0),
    "mean": lambda mats, ranks: np.mean(mats, axis=0),
    "iso": lambda mats, ranks: np.sum(mats, axis=0),
    "ties": ties,
    "dare": lambda mats, ranks, drop_rate: np.sum(mats, axis=0),
    "dare_ties": ties,
    "breadcrumbs": breadcrumbs,
    "della": lambda mats, ranks, drop_rate, epsilon: ties(mats, ranks, 1.0),
    "sce": sce,
    "karcher": karcher,
    "tsv": tsv,
    "cart": cart,
}
