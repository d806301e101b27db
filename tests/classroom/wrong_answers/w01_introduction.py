"""Mistakes that readers of the introduction make, and a part of the message that each should get."""

from tests.classroom.gate import Wrong

WRONG = [
    Wrong(
        "e1_bytes",
        "gives bits",
        """
def weight_bytes(rows, columns, bits, group_size, scale_bits=32):
    return rows * columns * bits + rows * columns // group_size * scale_bits
""",
        "a byte has 8 of them",
    ),
    Wrong(
        "e1_bytes",
        "forgets the scales",
        """
def weight_bytes(rows, columns, bits, group_size, scale_bits=32):
    return math.ceil(rows * columns * bits / 8)
""",
        "the weights alone",
    ),
    Wrong(
        "e1_bytes",
        "one scale for each row",
        """
def weight_bytes(rows, columns, bits, group_size, scale_bits=32):
    return math.ceil((rows * columns * bits + rows * scale_bits) / 8)
""",
        "one scale for each row",
    ),
    Wrong(
        "e1_bytes",
        "stores 4 bits as int8",
        """
def weight_bytes(rows, columns, bits, group_size, scale_bits=32):
    return rows * columns + rows * columns // group_size * scale_bits // 8
""",
        "packed without gaps",
    ),
    Wrong(
        "e1_bytes",
        "scales are always float32",
        """
def weight_bytes(rows, columns, bits, group_size, scale_bits=32):
    return math.ceil((rows * columns * bits + rows * columns // group_size * 32) / 8)
""",
        "use scale_bits",
    ),
    Wrong(
        "e1_bytes",
        "rounds down",
        """
def weight_bytes(rows, columns, bits, group_size, scale_bits=32):
    return (rows * columns * bits + rows * columns // group_size * scale_bits) // 8
""",
        "round up",
    ),
    Wrong(
        "e2_qparams",
        "divides by the number of levels",
        """
def affine_qparams(low, high, bits):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 2**bits
    return scale, round(-low / scale)
""",
        "15 steps",
    ),
    Wrong(
        "e2_qparams",
        "symmetric range",
        """
def affine_qparams(low, high, bits):
    high = max(abs(low), abs(high))
    scale = 2 * high / (2**bits - 1)
    return scale, round(high / scale)
""",
        "the symmetric quantizer",
    ),
    Wrong(
        "e2_qparams",
        "wrong sign of the zero_point",
        """
def affine_qparams(low, high, bits):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(low / scale)
""",
        "mind the sign",
    ),
    Wrong(
        "e2_qparams",
        "zero_point of signed integers",
        """
def affine_qparams(low, high, bits):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, -(2 ** (bits - 1)) + round(-low / scale)
""",
        "signed integers",
    ),
    Wrong(
        "e2_qparams",
        "does not round the zero_point",
        """
def affine_qparams(low, high, bits):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, -low / scale
""",
        "must be an integer",
    ),
    Wrong(
        "e2_qparams",
        "cuts the fraction off",
        """
def affine_qparams(low, high, bits):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, int(-low / scale + 1e-6)
""",
        "do not cut the fraction off",
    ),
    Wrong(
        "e2_qparams",
        "range without 0, zero_point clamped",
        """
def affine_qparams(low, high, bits):
    scale = (high - low) / (2**bits - 1)
    return scale, min(max(round(-low / scale), 0), 2**bits - 1)
""",
        "low = min(low, 0)",
    ),
    Wrong(
        "e2_qparams",
        "widens downwards only",
        """
def affine_qparams(low, high, bits):
    low = min(low, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, min(round(-low / scale), 2**bits - 1)
""",
        "high = max(high, 0)",
    ),
    Wrong(
        "e3_round_trip",
        "no clamp",
        """
def round_trip(weight, scale, bits):
    q = (weight / scale[:, None]).round()
    return q.to(torch.int8), q * scale[:, None]
""",
        "the greatest signed integer is 3",
    ),
    Wrong(
        "e3_round_trip",
        "converts to int8, then clamps",
        """
def round_trip(weight, scale, bits):
    q = (weight / scale[:, None]).round().int().to(torch.int8)
    q = q.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return q, q * scale[:, None]
""",
        "starts again at -128",
    ),
    Wrong(
        "e3_round_trip",
        "unsigned integers",
        """
def round_trip(weight, scale, bits):
    q = (weight / scale[:, None]).round().clamp(0, 2**bits - 1)
    return q.to(torch.int8), q * scale[:, None]
""",
        "the greatest signed integer is 3",
    ),
    Wrong(
        "e3_round_trip",
        "lowest level left out",
        """
def round_trip(weight, scale, bits):
    high = 2 ** (bits - 1) - 1
    q = (weight / scale[:, None]).round().clamp(-high, high)
    return q.to(torch.int8), q * scale[:, None]
""",
        "one level more",
    ),
    Wrong(
        "e3_round_trip",
        "scale meets columns",
        """
def round_trip(weight, scale, bits):
    q = (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return q.to(torch.int8), q * scale
""",
        "row i belongs to scale i",
    ),
    Wrong(
        "e3_round_trip",
        "does not round",
        """
def round_trip(weight, scale, bits):
    q = (weight / scale[:, None]).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
    return q, q * scale[:, None]
""",
        "cuts the fraction off",
    ),
    Wrong(
        "e3_round_trip",
        "rounds before it divides",
        """
def round_trip(weight, scale, bits):
    q = (weight.round() / scale[:, None]).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
    return q, q * scale[:, None]
""",
        "round first",
    ),
    Wrong(
        "e3_round_trip",
        "w_hat from values that were not clamped",
        """
def round_trip(weight, scale, bits):
    q = (weight / scale[:, None]).round()
    return q.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8), q * scale[:, None]
""",
        "from the clamped q",
    ),
    Wrong(
        "e3_round_trip",
        "w_hat are the integers",
        """
def round_trip(weight, scale, bits):
    q = (weight / scale[:, None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return q.to(torch.int8), q
""",
        "still the integers",
    ),
    Wrong(
        "e4_sqnr",
        "noise over signal",
        """
def group_sqnr_db(weight, bits, group_size):
    groups = weight.reshape(-1, group_size)
    scale = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    noise = groups - (groups / scale).round() * scale
    return (10 * torch.log10(noise.square().sum() / groups.square().sum())).item()
""",
        "the signal belongs above",
    ),
    Wrong(
        "e4_sqnr",
        "20 log10 of powers",
        """
def group_sqnr_db(weight, bits, group_size):
    groups = weight.reshape(-1, group_size)
    scale = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    noise = groups - (groups / scale).round() * scale
    return (20 * torch.log10(groups.square().sum() / noise.square().sum())).item()
""",
        "10 and not 20",
    ),
    Wrong(
        "e4_sqnr",
        "natural logarithm",
        """
def group_sqnr_db(weight, bits, group_size):
    groups = weight.reshape(-1, group_size)
    scale = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    noise = groups - (groups / scale).round() * scale
    return (10 * torch.log(groups.square().sum() / noise.square().sum())).item()
""",
        "decibels need log10",
    ),
    Wrong(
        "e4_sqnr",
        "one scale for the tensor",
        """
def group_sqnr_db(weight, bits, group_size):
    groups = weight.reshape(-1, group_size)
    scale = groups.abs().max() / (2 ** (bits - 1) - 1)
    noise = groups - (groups / scale).round() * scale
    return (10 * torch.log10(groups.square().sum() / noise.square().sum())).item()
""",
        "one scale for the whole tensor",
    ),
    Wrong(
        "e4_sqnr",
        "one scale for each row",
        """
def group_sqnr_db(weight, bits, group_size):
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    noise = weight - (weight / scale).round() * scale
    return (10 * torch.log10(weight.square().sum() / noise.square().sum())).item()
""",
        "one scale for each row",
    ),
    Wrong(
        "e4_sqnr",
        "groups of weights that lie far apart",
        """
def group_sqnr_db(weight, bits, group_size):
    groups = weight.reshape(group_size, -1)
    scale = groups.abs().amax(0, keepdim=True) / (2 ** (bits - 1) - 1)
    noise = groups - (groups / scale).round() * scale
    return (10 * torch.log10(groups.square().sum() / noise.square().sum())).item()
""",
        "takes weights that lie far apart",
    ),
    Wrong(
        "e4_sqnr",
        "levels of an unsigned integer",
        """
def group_sqnr_db(weight, bits, group_size):
    groups = weight.reshape(-1, group_size)
    scale = groups.abs().amax(1, keepdim=True) / (2**bits - 1)
    noise = groups - (groups / scale).round() * scale
    return (10 * torch.log10(groups.square().sum() / noise.square().sum())).item()
""",
        "one bit more",
    ),
    Wrong(
        "e4_sqnr",
        "averages decibels",
        """
def group_sqnr_db(weight, bits, group_size):
    groups = weight.reshape(-1, group_size)
    scale = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    noise = groups - (groups / scale).round() * scale
    return (10 * torch.log10(groups.square().sum(1) / noise.square().sum(1))).mean().item()
""",
        "average the decibels",
    ),
    Wrong(
        "e4_sqnr",
        "maximum instead of magnitude",
        """
def group_sqnr_db(weight, bits, group_size):
    groups = weight.reshape(-1, group_size)
    scale = groups.amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    noise = groups - (groups / scale).round() * scale
    return (10 * torch.log10(groups.square().sum() / noise.square().sum())).item()
""",
        "the largest magnitude",
    ),
    Wrong(
        "e5_report",
        "draws sentences",
        """
def film_report(features, labels, films, fit, share, seed):
    order = torch.randperm(len(films), generator=torch.Generator().manual_seed(seed))
    is_test = torch.zeros(len(films), dtype=torch.bool)
    is_test[order[: round(share * len(films))]] = True
    right = fit(features[~is_test], labels[~is_test])(features[is_test]) == labels[is_test]
    return is_test, *measure.accuracy(right.long(), torch.ones(len(right), dtype=torch.int64)).as_dict().values()
""",
        "that leaks",
    ),
    Wrong(
        "e5_report",
        "training and test change places",
        """
def film_report(features, labels, films, fit, share, seed):
    names = films.unique()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    is_test = ~torch.isin(films, names[order[: round(share * len(names))]])
    right = fit(features[~is_test], labels[~is_test])(features[is_test]) == labels[is_test]
    return is_test, *measure.accuracy(right.long(), torch.ones(len(right), dtype=torch.int64)).as_dict().values()
""",
        "changed places",
    ),
    Wrong(
        "e5_report",
        "fits on everything",
        """
def film_report(features, labels, films, fit, share, seed):
    names = films.unique()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    is_test = torch.isin(films, names[order[: round(share * len(names))]])
    right = fit(features, labels)(features[is_test]) == labels[is_test]
    return is_test, *measure.accuracy(right.long(), torch.ones(len(right), dtype=torch.int64)).as_dict().values()
""",
        "fit has seen",
    ),
    Wrong(
        "e5_report",
        "measures on all sentences",
        """
def film_report(features, labels, films, fit, share, seed):
    names = films.unique()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    is_test = torch.isin(films, names[order[: round(share * len(names))]])
    right = fit(features[~is_test], labels[~is_test])(features) == labels
    return is_test, *measure.accuracy(right.long(), torch.ones(len(right), dtype=torch.int64)).as_dict().values()
""",
        "counts the training sentences too",
    ),
    Wrong(
        "e5_report",
        "ignores the seed",
        """
def film_report(features, labels, films, fit, share, seed):
    names = films.unique()
    is_test = torch.isin(films, names[: round(share * len(names))])
    right = fit(features[~is_test], labels[~is_test])(features[is_test]) == labels[is_test]
    return is_test, *measure.accuracy(right.long(), torch.ones(len(right), dtype=torch.int64)).as_dict().values()
""",
        "five seeds give the same split",
    ),
    Wrong(
        "e5_report",
        "shuffles without the seed",
        """
def film_report(features, labels, films, fit, share, seed):
    names = films.unique()
    is_test = torch.isin(films, names[torch.randperm(len(names))[: round(share * len(names))]])
    right = fit(features[~is_test], labels[~is_test])(features[is_test]) == labels[is_test]
    return is_test, *measure.accuracy(right.long(), torch.ones(len(right), dtype=torch.int64)).as_dict().values()
""",
        "two different splits",
    ),
    Wrong(
        "e5_report",
        "the interval that is not Wilson's",
        """
def film_report(features, labels, films, fit, share, seed):
    names = films.unique()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    is_test = torch.isin(films, names[order[: round(share * len(names))]])
    right = fit(features[~is_test], labels[~is_test])(features[is_test]) == labels[is_test]
    p = right.float().mean().item()
    half = 1.96 * math.sqrt(p * (1 - p) / len(right))
    return is_test, p, p - half, p + half
""",
        "not Wilson's",
    ),
    Wrong(
        "e5_report",
        "n counts all sentences",
        """
def film_report(features, labels, films, fit, share, seed):
    names = films.unique()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    is_test = torch.isin(films, names[order[: round(share * len(names))]])
    right = fit(features[~is_test], labels[~is_test])(features[is_test]) == labels[is_test]
    p, n, u = right.float().mean().item(), len(films), 1.96
    half = u * math.sqrt(p * (1 - p) / n + u**2 / (4 * n**2))
    return is_test, p, (p + u**2 / (2 * n) - half) / (1 + u**2 / n), (p + u**2 / (2 * n) + half) / (1 + u**2 / n)
""",
        "Is n the number of test sentences",
    ),
    Wrong(
        "e5_report",
        "forgets to divide by 1 + u**2 / n",
        """
def film_report(features, labels, films, fit, share, seed):
    names = films.unique()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    is_test = torch.isin(films, names[order[: round(share * len(names))]])
    right = fit(features[~is_test], labels[~is_test])(features[is_test]) == labels[is_test]
    p, n, u = right.float().mean().item(), len(right), 1.96
    half = u * math.sqrt(p * (1 - p) / n + u**2 / (4 * n**2))
    return is_test, p, p + u**2 / (2 * n) - half, p + u**2 / (2 * n) + half
""",
        "give Wilson's interval",
    ),
]
