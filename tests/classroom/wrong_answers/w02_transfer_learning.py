"""Plausible wrong answers to the exercises of chapter 2."""

from tests.classroom.gate import Wrong

WRONG = [
    Wrong(
        "e1_freeze",
        "sets an attribute on the module",
        '''
def freeze_body(model):
    model.body.requires_grad = False
    model.body.eval()
    model.head.train()
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
''',
        "only hangs a new attribute on the module",
    ),
    Wrong(
        "e1_freeze",
        "leaves the batch norms in training mode",
        '''
def freeze_body(model):
    model.train()
    model.body.requires_grad_(False)
    model.head.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
''',
        "changed the running statistics",
    ),
    Wrong(
        "e1_freeze",
        "counts tensors",
        '''
def freeze_body(model):
    model.body.requires_grad_(False).eval()
    model.head.requires_grad_(True).train()
    return sum(p.requires_grad for p in model.parameters())
''',
        "number of tensors",
    ),
    Wrong(
        "e1_freeze",
        "freezes everything",
        '''
def freeze_body(model):
    for p in model.parameters():
        p.requires_grad = False
    model.body.eval()
    return sum(p.numel() for p in model.head.parameters())
''',
        "the head is frozen as well",
    ),
    Wrong(
        "e1_freeze",
        "counts all parameters",
        '''
def freeze_body(model):
    model.body.requires_grad_(False).eval()
    model.head.requires_grad_(True).train()
    return sum(p.numel() for p in model.parameters())
''',
        "85 trainable values",
    ),
    Wrong(
        "e1_freeze",
        "puts the whole model in evaluation mode",
        '''
def freeze_body(model):
    model.eval()
    model.body.requires_grad_(False)
    model.head.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
''',
        "put the head in training mode",
    ),
    Wrong(
        "e1_freeze",
        "does not wake a head that was frozen before",
        '''
def freeze_body(model):
    model.body.requires_grad_(False).eval()
    model.head.train()
    return sum(p.numel() for p in model.head.parameters())
''',
        "must be made to learn again",
    ),
    Wrong(
        "e2_smoothing",
        "spreads over the wrong classes only",
        '''
def smoothed_loss(logits, targets, smoothing):
    k = logits.shape[1]
    wanted = torch.full_like(logits, smoothing / (k - 1)).scatter(1, targets[:, None], 1 - smoothing)
    return -(wanted * F.log_softmax(logits, 1)).sum(1).mean()
''',
        "the K - 1 wrong classes",
    ),
    Wrong(
        "e2_smoothing",
        "the right class loses its share",
        '''
def smoothed_loss(logits, targets, smoothing):
    wanted = torch.full_like(logits, smoothing / logits.shape[1]).scatter(1, targets[:, None], 1 - smoothing)
    return -(wanted * F.log_softmax(logits, 1)).sum(1).mean()
''',
        "adds up to less than 1",
    ),
    Wrong(
        "e2_smoothing",
        "the logarithm of a softmax",
        '''
def smoothed_loss(logits, targets, smoothing):
    k = logits.shape[1]
    wanted = F.one_hot(targets, k) * (1 - smoothing) + smoothing / k
    return -(wanted * logits.softmax(1).log()).sum(1).mean()
''',
        "not the logarithm of the softmax",
    ),
    Wrong(
        "e2_smoothing",
        "the mean over classes as well",
        '''
def smoothed_loss(logits, targets, smoothing):
    k = logits.shape[1]
    wanted = F.one_hot(targets, k) * (1 - smoothing) + smoothing / k
    return -(wanted * F.log_softmax(logits, 1)).mean()
''',
        "mean over the classes as well",
    ),
    Wrong(
        "e2_smoothing",
        "adds the examples up",
        '''
def smoothed_loss(logits, targets, smoothing):
    k = logits.shape[1]
    wanted = F.one_hot(targets, k) * (1 - smoothing) + smoothing / k
    return -(wanted * F.log_softmax(logits, 1)).sum()
''',
        "take the mean over the batch",
    ),
    Wrong(
        "e2_smoothing",
        "forgets the smoothing",
        '''
def smoothed_loss(logits, targets, smoothing):
    return F.nll_loss(F.log_softmax(logits, 1), targets)
''',
        "without smoothing",
    ),
    Wrong(
        "e2_smoothing",
        "not by hand",
        '''
def smoothed_loss(logits, targets, smoothing):
    return nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, targets)
''',
        "by hand, please",
    ),
    Wrong(
        "e2_smoothing",
        "detaches",
        '''
def smoothed_loss(logits, targets, smoothing):
    k = logits.shape[1]
    wanted = F.one_hot(targets, k) * (1 - smoothing) + smoothing / k
    return -(wanted * F.log_softmax(logits.detach(), 1)).sum(1).mean()
''',
        "has no gradient",
    ),
    Wrong(
        "e3_best",
        "keeps the state dict without a copy",
        '''
def train_keeping_best(model, epochs, train_epoch, loss_on):
    best = float("inf")
    for epoch in range(epochs):
        train_epoch(model)
        loss = loss_on(model, "validation")
        if loss < best:
            best, best_epoch, state = loss, epoch, model.state_dict()
    model.load_state_dict(state)
    return best_epoch, loss_on(model, "test")
''',
        "hands out the living tensors",
    ),
    Wrong(
        "e3_best",
        "copies the dictionary, not the tensors",
        '''
def train_keeping_best(model, epochs, train_epoch, loss_on):
    best = float("inf")
    for epoch in range(epochs):
        train_epoch(model)
        loss = loss_on(model, "validation")
        if loss < best:
            best, best_epoch, state = loss, epoch, model.state_dict().copy()
    model.load_state_dict(state)
    return best_epoch, loss_on(model, "test")
''',
        "hands out the living tensors",
    ),
    Wrong(
        "e3_best",
        "puts back another model under a local name",
        '''
def train_keeping_best(model, epochs, train_epoch, loss_on):
    best = float("inf")
    for epoch in range(epochs):
        train_epoch(model)
        loss = loss_on(model, "validation")
        if loss < best:
            best, best_epoch, kept = loss, epoch, copy.deepcopy(model)
    model = kept
    return best_epoch, loss_on(model, "test")
''',
        "the caller's model does not end",
    ),
    Wrong(
        "e3_best",
        "chooses by the test part",
        '''
def train_keeping_best(model, epochs, train_epoch, loss_on):
    best = float("inf")
    for epoch in range(epochs):
        train_epoch(model)
        loss = loss_on(model, "test")
        if loss < best:
            best, best_epoch, state = loss, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return best_epoch, best
''',
        "choose by the validation part",
    ),
    Wrong(
        "e3_best",
        "tests in every epoch",
        '''
def train_keeping_best(model, epochs, train_epoch, loss_on):
    best = float("inf")
    for epoch in range(epochs):
        train_epoch(model)
        loss, test = loss_on(model, "validation"), loss_on(model, "test")
        if loss < best:
            best, best_epoch, reported, state = loss, epoch, test, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return best_epoch, reported
''',
        "look once",
    ),
    Wrong(
        "e3_best",
        "keeps the latest of equals",
        '''
def train_keeping_best(model, epochs, train_epoch, loss_on):
    best = float("inf")
    for epoch in range(epochs):
        train_epoch(model)
        loss = loss_on(model, "validation")
        if loss <= best:
            best, best_epoch, state = loss, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return best_epoch, loss_on(model, "test")
''',
        "keep the earliest",
    ),
    Wrong(
        "e3_best",
        "takes loss for accuracy",
        '''
def train_keeping_best(model, epochs, train_epoch, loss_on):
    best = 0
    for epoch in range(epochs):
        train_epoch(model)
        loss = loss_on(model, "validation")
        if loss > best:
            best, best_epoch, state = loss, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return best_epoch, loss_on(model, "test")
''',
        "best means the least",
    ),
    Wrong(
        "e3_best",
        "leaves buffers out",
        '''
def train_keeping_best(model, epochs, train_epoch, loss_on):
    best = float("inf")
    for epoch in range(epochs):
        train_epoch(model)
        loss = loss_on(model, "validation")
        if loss < best:
            best, best_epoch, kept = loss, epoch, [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, value in zip(model.parameters(), kept):
            p.copy_(value)
    return best_epoch, loss_on(model, "test")
''',
        "parameters() leaves buffers out",
    ),
    Wrong(
        "e3_best",
        "tests before the weights are back",
        '''
def train_keeping_best(model, epochs, train_epoch, loss_on):
    best = float("inf")
    for epoch in range(epochs):
        train_epoch(model)
        loss = loss_on(model, "validation")
        if loss < best:
            best, best_epoch, state = loss, epoch, copy.deepcopy(model.state_dict())
    test = loss_on(model, "test")
    model.load_state_dict(state)
    return best_epoch, test
''',
        "first put them back, then test",
    ),
    Wrong(
        "e3_best",
        "begins with a best loss of one",
        '''
def train_keeping_best(model, epochs, train_epoch, loss_on):
    best, best_epoch, state = 1.0, 0, copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        train_epoch(model)
        loss = loss_on(model, "validation")
        if loss < best:
            best, best_epoch, state = loss, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return best_epoch, loss_on(model, "test")
''',
        "a loss may be of any size",
    ),
    Wrong(
        "e4_observer",
        "the last batch alone",
        '''
def calibrate(batches, bits, percent=100.0):
    for b in batches:
        low = min(0.0, b.quantile(1 - percent / 100).item())
        high = max(0.0, b.quantile(percent / 100).item())
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)
''',
        "the last batch alone",
    ),
    Wrong(
        "e4_observer",
        "averages the ranges",
        '''
def calibrate(batches, bits, percent=100.0):
    low = min(0.0, sum(b.quantile(1 - percent / 100).item() for b in batches) / len(batches))
    high = max(0.0, sum(b.quantile(percent / 100).item() for b in batches) / len(batches))
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)
''',
        "you average the ranges",
    ),
    Wrong(
        "e4_observer",
        "divides by the number of levels",
        '''
def calibrate(batches, bits, percent=100.0):
    low = min(0.0, *(b.quantile(1 - percent / 100).item() for b in batches))
    high = max(0.0, *(b.quantile(percent / 100).item() for b in batches))
    scale = (high - low) / 2**bits
    return scale, round(-low / scale)
''',
        "there are 255 steps",
    ),
    Wrong(
        "e4_observer",
        "the wrong sign of the zero point",
        '''
def calibrate(batches, bits, percent=100.0):
    low = min(0.0, *(b.quantile(1 - percent / 100).item() for b in batches))
    high = max(0.0, *(b.quantile(percent / 100).item() for b in batches))
    scale = (high - low) / (2**bits - 1)
    return scale, round(low / scale)
''',
        "wrong sign",
    ),
    Wrong(
        "e4_observer",
        "leaves zero out of the range",
        '''
def calibrate(batches, bits, percent=100.0):
    low = min(b.quantile(1 - percent / 100).item() for b in batches)
    high = max(b.quantile(percent / 100).item() for b in batches)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)
''',
        "zero must have its level",
    ),
    Wrong(
        "e4_observer",
        "ignores percent",
        '''
def calibrate(batches, bits, percent=100.0):
    low, high = min(0.0, *(b.min().item() for b in batches)), max(0.0, *(b.max().item() for b in batches))
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)
''',
        "percent changes nothing",
    ),
    Wrong(
        "e4_observer",
        "cuts off the upper end only",
        '''
def calibrate(batches, bits, percent=100.0):
    low = min(0.0, *(b.min().item() for b in batches))
    high = max(0.0, *(b.quantile(percent / 100).item() for b in batches))
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)
''',
        "cut off one end only",
    ),
    Wrong(
        "e4_observer",
        "halves the tail",
        '''
def calibrate(batches, bits, percent=100.0):
    tail = (1 - percent / 100) / 2
    low = min(0.0, *(b.quantile(tail).item() for b in batches))
    high = max(0.0, *(b.quantile(1 - tail).item() for b in batches))
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)
''',
        "you halve the tail",
    ),
    Wrong(
        "e4_observer",
        "pools the batches",
        '''
def calibrate(batches, bits, percent=100.0):
    values = torch.cat([b.flatten() for b in batches])
    low, high = min(0.0, values.quantile(1 - percent / 100).item()), max(0.0, values.quantile(percent / 100).item())
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)
''',
        "an observer sees one batch at a time",
    ),
    Wrong(
        "e4_observer",
        "truncates the zero point",
        '''
def calibrate(batches, bits, percent=100.0):
    low = min(0.0, *(b.quantile(1 - percent / 100).item() for b in batches))
    high = max(0.0, *(b.quantile(percent / 100).item() for b in batches))
    scale = (high - low) / (2**bits - 1)
    return scale, int(-low / scale + 1e-6)
''',
        "zero_point is the integer next to",
    ),
    Wrong(
        "e5_blame",
        "rounds the caller's weights",
        '''
@torch.no_grad()
def rank_suspects(model, x, bits, axis=None):
    expected, found = model(x), {}
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            q = quantization.choose_qparams(m.weight, bits, symmetric=True, axis=axis)
            m.weight.copy_(quantization.fake_quantize(m.weight, q))
            found[name] = quantization.sqnr_db(expected, model(x))
    return sorted(found.items(), key=lambda pair: pair[1])
''',
        "the caller's model has changed",
    ),
    Wrong(
        "e5_blame",
        "puts back an alias instead of a clone",
        '''
@torch.no_grad()
def rank_suspects(model, x, bits, axis=None):
    expected, found = model(x), {}
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            saved = m.weight.data
            q = quantization.choose_qparams(m.weight, bits, symmetric=True, axis=axis)
            m.weight.copy_(quantization.fake_quantize(m.weight, q))
            found[name] = quantization.sqnr_db(expected, model(x))
            m.weight.data = saved
    return sorted(found.items(), key=lambda pair: pair[1])
''',
        "a clone of it",
    ),
    Wrong(
        "e5_blame",
        "one copy for all, so the errors add up",
        '''
@torch.no_grad()
def rank_suspects(model, x, bits, axis=None):
    expected, found, model = model(x), {}, copy.deepcopy(model)
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            q = quantization.choose_qparams(m.weight, bits, symmetric=True, axis=axis)
            m.weight.copy_(quantization.fake_quantize(m.weight, q))
            found[name] = quantization.sqnr_db(expected, model(x))
    return sorted(found.items(), key=lambda pair: pair[1])
''',
        "Begin each turn from the float model",
    ),
    Wrong(
        "e5_blame",
        "sees the children only",
        '''
@torch.no_grad()
def rank_suspects(model, x, bits, axis=None):
    expected, found = model(x), {}
    for name, m in model.named_children():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            saved = m.weight.clone()
            q = quantization.choose_qparams(m.weight, bits, symmetric=True, axis=axis)
            m.weight.copy_(quantization.fake_quantize(m.weight, q))
            found[name] = quantization.sqnr_db(expected, model(x))
            m.weight.copy_(saved)
    return sorted(found.items(), key=lambda pair: pair[1])
''',
        "these layers are missing",
    ),
    Wrong(
        "e5_blame",
        "measures the weights, not the answers",
        '''
@torch.no_grad()
def rank_suspects(model, x, bits, axis=None):
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            q = quantization.choose_qparams(m.weight, bits, symmetric=True, axis=axis)
            found[name] = quantization.sqnr_db(m.weight, quantization.fake_quantize(m.weight, q))
    return sorted(found.items(), key=lambda pair: pair[1])
''',
        "yours is the SQNR of the weights",
    ),
    Wrong(
        "e5_blame",
        "the best first",
        '''
@torch.no_grad()
def rank_suspects(model, x, bits, axis=None):
    expected, found = model(x), {}
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            saved = m.weight.clone()
            q = quantization.choose_qparams(m.weight, bits, symmetric=True, axis=axis)
            m.weight.copy_(quantization.fake_quantize(m.weight, q))
            found[name] = quantization.sqnr_db(expected, model(x))
            m.weight.copy_(saved)
    return sorted(found.items(), key=lambda pair: pair[1], reverse=True)
''',
        "the worst comes first",
    ),
    Wrong(
        "e5_blame",
        "one scale for all channels, whatever axis says",
        '''
@torch.no_grad()
def rank_suspects(model, x, bits, axis=None):
    expected, found = model(x), {}
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            saved = m.weight.clone()
            q = quantization.choose_qparams(m.weight, bits, symmetric=True)
            m.weight.copy_(quantization.fake_quantize(m.weight, q))
            found[name] = quantization.sqnr_db(expected, model(x))
            m.weight.copy_(saved)
    return sorted(found.items(), key=lambda pair: pair[1])
''',
        "pass axis on",
    ),
    Wrong(
        "e5_blame",
        "swaps the float output and the rounded one",
        '''
@torch.no_grad()
def rank_suspects(model, x, bits, axis=None):
    expected, found = model(x), {}
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            saved = m.weight.clone()
            q = quantization.choose_qparams(m.weight, bits, symmetric=True, axis=axis)
            m.weight.copy_(quantization.fake_quantize(m.weight, q))
            found[name] = quantization.sqnr_db(model(x), expected)
            m.weight.copy_(saved)
    return sorted(found.items(), key=lambda pair: pair[1])
''',
        "the decibels are wrong",
    ),
]
