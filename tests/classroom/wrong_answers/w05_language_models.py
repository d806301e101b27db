from tests.classroom.gate import Wrong

WRONG = [
    Wrong("e1_perplexity", "returns the mean loss", '''
def perplexity(nats, predicted):
    return nats[predicted].mean().item()
''', "the perplexity is its exponential"),
    Wrong("e1_perplexity", "takes nats for bits", '''
def perplexity(nats, predicted):
    return 2 ** nats[predicted].mean().item()
''', "the base is e, not 2"),
    Wrong("e1_perplexity", "averages over padding too", '''
def perplexity(nats, predicted):
    return nats.mean().exp().item()
''', "the losses at padding are in your mean"),
    Wrong("e1_perplexity", "zeroes padding, and counts it", '''
def perplexity(nats, predicted):
    return (nats * predicted).mean().exp().item()
''', "padding still counts as tokens without a loss"),
    Wrong("e1_perplexity", "averages perplexities of documents", '''
def perplexity(nats, predicted):
    each = (nats * predicted).sum(1) / predicted.sum(1)
    return each.exp().mean().item()
''', "the mean of each document's perplexity"),
    Wrong("e1_perplexity", "averages means of documents", '''
def perplexity(nats, predicted):
    each = (nats * predicted).sum(1) / predicted.sum(1)
    return each.mean().exp().item()
''', "gives each document the same weight"),

    Wrong("e2_pack", "pairs neighbours", '''
def pack_halves(codes):
    if codes.shape[1] % 2:
        raise ValueError("odd")
    return codes[:, ::2] | codes[:, 1::2] << 4
''', "you pair neighbours"),
    Wrong("e2_pack", "swaps the halves", '''
def pack_halves(codes):
    if codes.shape[1] % 2:
        raise ValueError("odd")
    low, high = codes.chunk(2, 1)
    return low << 4 | high
''', "your halves are swapped"),
    Wrong("e2_pack", "keeps wide integers", '''
def pack_halves(codes):
    if codes.shape[1] % 2:
        raise ValueError("odd")
    low, high = codes.int().chunk(2, 1)
    return low + 16 * high
''', "return uint8"),
    Wrong("e2_pack", "one code to a byte", '''
def pack_halves(codes):
    if codes.shape[1] % 2:
        raise ValueError("odd")
    return codes.to(torch.uint8)
''', "make 2 rows of 2 bytes"),
    Wrong("e2_pack", "adds before it shifts", '''
def pack_halves(codes):
    if codes.shape[1] % 2:
        raise ValueError("odd")
    low, high = codes.chunk(2, 1)
    return low + high << 4
''', "mind the brackets"),
    Wrong("e2_pack", "broadcasts an odd row", '''
def pack_halves(codes):
    half = codes.shape[1] // 2
    return codes[:, :half] | codes[:, half:] << 4
''', "no error, and other codes"),
    Wrong("e2_pack", "drops an odd code", '''
def pack_halves(codes):
    half = codes.shape[1] // 2
    return codes[:, :half] | codes[:, half : 2 * half] << 4
''', "no error, and other codes"),

    Wrong("e3_groups", "divides by 16", '''
def quantize_groups(weight):
    groups = weight.unflatten(1, (-1, 32))
    low = groups.amin(-1, keepdim=True)
    scale = ((groups.amax(-1, keepdim=True) - low) / 16).clamp(min=1e-8)
    codes = ((groups - low) / scale).round().clamp(0, 15)
    return codes.flatten(1), scale[..., 0], low[..., 0]
''', "sixteen codes have 15 steps"),
    Wrong("e3_groups", "symmetric, from the largest absolute value", '''
def quantize_groups(weight):
    groups = weight.unflatten(1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-8)
    codes = (groups / scale).round().clamp(-8, 7) + 8
    return codes.flatten(1), scale[..., 0], -8 * scale[..., 0]
''', "your scale is symmetric"),
    Wrong("e3_groups", "one scale for each row", '''
def quantize_groups(weight):
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-8)
    codes = ((weight - low) / scale).round()
    groups = weight.shape[1] // 32
    return codes, scale.repeat(1, groups), low.repeat(1, groups)
''', "take the range of each group of 32"),
    Wrong("e3_groups", "one scale for the tensor", '''
def quantize_groups(weight):
    low, high = weight.min(), weight.max()
    scale = ((high - low) / 15).clamp(min=1e-8)
    codes = ((weight - low) / scale).round()
    shape = (len(weight), weight.shape[1] // 32)
    return codes, scale.expand(shape), low.expand(shape)
''', "take the range of each group of 32"),
    Wrong("e3_groups", "rounds before it shifts", '''
def quantize_groups(weight):
    groups = weight.unflatten(1, (-1, 32))
    low = groups.amin(-1, keepdim=True)
    scale = ((groups.amax(-1, keepdim=True) - low) / 15).clamp(min=1e-8)
    codes = ((groups / scale).round() - (low / scale).round()).clamp(0, 15)
    return codes.flatten(1), scale[..., 0], low[..., 0]
''', "Subtract the minimum first"),
    Wrong("e3_groups", "cuts instead of rounding", '''
def quantize_groups(weight):
    groups = weight.unflatten(1, (-1, 32))
    low = groups.amin(-1, keepdim=True)
    scale = ((groups.amax(-1, keepdim=True) - low) / 15).clamp(min=1e-8)
    codes = ((groups - low) / scale).floor().clamp(0, 15)
    return codes.flatten(1), scale[..., 0], low[..., 0]
''', "round last, to the nearest"),
    Wrong("e3_groups", "does not round", '''
def quantize_groups(weight):
    groups = weight.unflatten(1, (-1, 32))
    low = groups.amin(-1, keepdim=True)
    scale = ((groups.amax(-1, keepdim=True) - low) / 15).clamp(min=1e-8)
    return ((groups - low) / scale).flatten(1), scale[..., 0], low[..., 0]
''', "codes are whole numbers"),
    Wrong("e3_groups", "divides by a range of zero", '''
def quantize_groups(weight):
    groups = weight.unflatten(1, (-1, 32))
    low = groups.amin(-1, keepdim=True)
    scale = (groups.amax(-1, keepdim=True) - low) / 15
    codes = ((groups - low) / scale).round().clamp(0, 15)
    return codes.flatten(1), scale[..., 0], low[..., 0]
''', "0/0 is no number"),

    Wrong("e4_lora", "multiplies by alpha alone", '''
def add_lora(base, rank, alpha, generator):
    base.requires_grad_(False)
    A = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
    B = nn.Parameter(torch.zeros(base.out_features, rank))
    return Lora(A, B, lambda x: base(x) + alpha * (x @ A.T @ B.T), lambda: base.weight + alpha * (B @ A))
''', "is multiplied by alpha;"),
    Wrong("e4_lora", "both matrices begin at zero", '''
def add_lora(base, rank, alpha, generator):
    base.requires_grad_(False)
    A = nn.Parameter(torch.zeros(rank, base.in_features))
    B = nn.Parameter(torch.zeros(base.out_features, rank))
    s = alpha / rank
    return Lora(A, B, lambda x: base(x) + s * (x @ A.T @ B.T), lambda: base.weight + s * (B @ A))
''', "nothing ever trains"),
    Wrong("e4_lora", "both matrices begin at random", '''
def add_lora(base, rank, alpha, generator):
    base.requires_grad_(False)
    A = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
    B = nn.Parameter(torch.randn(base.out_features, rank, generator=generator))
    s = alpha / rank
    return Lora(A, B, lambda x: base(x) + s * (x @ A.T @ B.T), lambda: base.weight + s * (B @ A))
''', "B must begin at zero"),
    Wrong("e4_lora", "leaves the base trainable", '''
def add_lora(base, rank, alpha, generator):
    A = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
    B = nn.Parameter(torch.zeros(base.out_features, rank))
    s = alpha / rank
    return Lora(A, B, lambda x: base(x) + s * (x @ A.T @ B.T), lambda: base.weight + s * (B @ A))
''', "the base layer would still train"),
    Wrong("e4_lora", "loses the bias", '''
def add_lora(base, rank, alpha, generator):
    base.requires_grad_(False)
    A = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
    B = nn.Parameter(torch.zeros(base.out_features, rank))
    s = alpha / rank
    return Lora(A, B, lambda x: x @ base.weight.T + s * (x @ A.T @ B.T), lambda: base.weight + s * (B @ A))
''', "loses the bias"),
    Wrong("e4_lora", "merges the transposed change", '''
def add_lora(base, rank, alpha, generator):
    base.requires_grad_(False)
    A = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
    B = nn.Parameter(torch.zeros(base.out_features, rank))
    s = alpha / rank
    return Lora(A, B, lambda x: base(x) + s * (x @ A.T @ B.T), lambda: base.weight + s * (A.T @ B.T))
''', "your merged change is transposed"),
    Wrong("e4_lora", "merges in place", '''
def add_lora(base, rank, alpha, generator):
    base.requires_grad_(False)
    A = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
    B = nn.Parameter(torch.zeros(base.out_features, rank))
    s = alpha / rank

    def merged():
        base.weight.data += s * (B @ A).detach()
        return base.weight

    return Lora(A, B, lambda x: base(x) + s * (x @ A.T @ B.T), merged)
''', "would add the adapter twice"),
    Wrong("e4_lora", "forgets the factor when it merges", '''
def add_lora(base, rank, alpha, generator):
    base.requires_grad_(False)
    A = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
    B = nn.Parameter(torch.zeros(base.out_features, rank))
    return Lora(A, B, lambda x: base(x) + alpha / rank * (x @ A.T @ B.T), lambda: base.weight + B @ A)
''', "it is W + alpha / rank * B A"),
    Wrong("e4_lora", "merges once, at the beginning", '''
def add_lora(base, rank, alpha, generator):
    base.requires_grad_(False)
    A = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
    B = nn.Parameter(torch.zeros(base.out_features, rank))
    s = alpha / rank
    weight = base.weight + s * (B @ A)
    return Lora(A, B, lambda x: base(x) + s * (x @ A.T @ B.T), lambda: weight)
''', "does not compute what forward does"),
]

ROWS = '''
def packed_row(documents, length, pad):
    rest = length - sum(map(len, documents))
    if rest < 0:
        raise ValueError("too long")
    ids = [token for part in documents for token in part] + [pad] * rest
    labels = [label for part in documents for label in [-100, *part[1:]]] + [-100] * rest
    positions = torch.tensor([place for part in documents for place in range(len(part))] + [0] * rest)
    document = positions.eq(0).cumsum(0)
    mask = (document[:, None] == document) & torch.ones(length, length, dtype=torch.bool).tril()
    return {"input_ids": torch.tensor(ids), "position_ids": positions, "labels": torch.tensor(labels), "mask": mask}
'''


def rows(mistake: str, right: str, wrong: str, message: str) -> Wrong:
    """The right answer to the project with one thing replaced."""
    assert ROWS.count(right) == 1, f"{right} is there {ROWS.count(right)} times"
    return Wrong("e5_rows", mistake, ROWS.replace(right, wrong), message)


BLOCKS, CAUSAL = "(document[:, None] == document)", "torch.ones(length, length, dtype=torch.bool).tril()"
LABELS = "[label for part in documents for label in [-100, *part[1:]]] + [-100] * rest"
POSITIONS = "[place for part in documents for place in range(len(part))] + [0] * rest"

WRONG += [
    rows("positions run on", POSITIONS, "list(range(length))", "they begin anew at 0"),
    rows("positions begin at 1", "range(len(part))", "range(1, len(part) + 1)", "your positions begin at 1"),
    rows("positions of padding run on", "+ [0] * rest)", "+ list(range(rest)))", "0 for each padding token"),
    rows("labels are the tokens", LABELS, "list(ids)", "the first token of each document has the label -100"),
    rows("labels are shifted", LABELS, "ids[1:] + [-100]", "your labels are shifted by one"),
    rows(
        "labels only the first document's first token as ignored",
        LABELS,
        "[-100, *ids[1 : length - rest]] + [-100] * rest",
        "the first token of each document has the label -100",
    ),
    rows(
        "labels ignore each token that looks like padding",
        LABELS,
        "[-100 if label == pad else label for part in documents for label in [-100, *part[1:]]] + [-100] * rest",
        "find padding by the lengths",
    ),
    rows("labels ask for padding", "+ [-100] * rest", "+ [pad] * rest", "the model learns to predict padding"),
    rows("mask without blocks", BLOCKS, "True", "the second document looks into the first one"),
    rows("mask without causality", CAUSAL, "True", "allow j <= i only"),
    rows("mask without the token itself", ".tril()", ".tril(-1)", "each token must see itself"),
    rows("mask in float", "& " + CAUSAL, "* " + CAUSAL + ".float()", "the mask is bool"),
    rows("mask the wrong way round", ".tril()", ".tril().T", "allow j <= i only"),
    rows(
        "mask by positions alone",
        BLOCKS,
        "(positions[:, None] >= positions)",
        "the second document looks into the first one",
    ),
    rows("cuts what does not fit", 'raise ValueError("too long")', "return None", "must raise a ValueError"),
]
