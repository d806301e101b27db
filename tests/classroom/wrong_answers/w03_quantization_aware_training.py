"""Plausible wrong answers to the exercises of the chapter on quantization-aware training."""

from tests.classroom.gate import Wrong

# Exercise 5 in full; each wrong answer changes one place.
COMPARE = """
def compare(start, train, held_out, rounding, steps, learning_rate):
    def trained(forward):
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=learning_rate)
        for t in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - t / steps)
            optimizer.zero_grad()
            F.mse_loss(train[0] @ forward(weight).T, train[1]).backward()
            optimizer.step()
        return weight.detach()

    control, qat = trained(nn.Identity()), trained(rounding)
    scored = {"start": start, "start_ptq": rounding(start), "control": control, "control_ptq": rounding(control)}
    scored["qat"] = rounding(qat)
    return {name: F.mse_loss(held_out[0] @ weight.T, held_out[1]).item() for name, weight in scored.items()}
"""


def compare_with(old: str, new: str) -> str:
    if COMPARE.count(old) != 1:
        raise ValueError(f"{old!r} is not in the answer exactly once")
    return COMPARE.replace(old, new)


WRONG = [
    Wrong(
        "e1_fake_quantize",
        "does not clamp",
        """
def fake_quantize(x, scale, zero_point, qmin, qmax):
    return (torch.round(x / scale) + zero_point - zero_point) * scale
""",
        "clamp q to qmin..qmax",
    ),
    Wrong(
        "e1_fake_quantize",
        "has the sign of the zero point the wrong way round",
        """
def fake_quantize(x, scale, zero_point, qmin, qmax):
    q = (torch.round(x / scale) - zero_point).clamp(qmin, qmax)
    return (q + zero_point) * scale
""",
        "the zero_point is added on the way to the integers",
    ),
    Wrong(
        "e1_fake_quantize",
        "clamps before it adds the zero point",
        """
def fake_quantize(x, scale, zero_point, qmin, qmax):
    q = torch.round(x / scale).clamp(qmin, qmax) + zero_point
    return (q - zero_point) * scale
""",
        "clamp q after you have added the zero_point",
    ),
    Wrong(
        "e1_fake_quantize",
        "returns the integers",
        """
def fake_quantize(x, scale, zero_point, qmin, qmax):
    return (torch.round(x / scale) + zero_point).clamp(qmin, qmax)
""",
        "go back to real values",
    ),
    Wrong(
        "e1_fake_quantize",
        "cuts off instead of rounding, as a cast to int does",
        """
def fake_quantize(x, scale, zero_point, qmin, qmax):
    q = ((x / scale).int() + zero_point).clamp(qmin, qmax)
    return (q - zero_point) * scale
""",
        "round to the nearest",
    ),
    Wrong(
        "e2_straight_through",
        "leaves out the straight-through estimator",
        """
def straight_through(x, scale, zero_point, qmin, qmax):
    q = (torch.round(x / scale) + zero_point).clamp(qmin, qmax)
    return (q - zero_point) * scale
""",
        "zero everywhere",
    ),
    Wrong(
        "e2_straight_through",
        "passes the gradient of clamped values, too",
        """
def straight_through(x, scale, zero_point, qmin, qmax):
    q = (torch.round(x / scale) + zero_point).clamp(qmin, qmax)
    return x + ((q - zero_point) * scale - x).detach()
""",
        "it must be 0 where the rounded integer is not on the grid",
    ),
    Wrong(
        "e2_straight_through",
        "clamps before it rounds",
        """
def straight_through(x, scale, zero_point, qmin, qmax):
    v = (x / scale + zero_point).clamp(qmin, qmax)
    return (v + (v.round() - v).detach() - zero_point) * scale
""",
        "let the rounded integer decide",
    ),
    Wrong(
        "e2_straight_through",
        "forgets the gradient from above",
        """
class Stairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, qmin, qmax):
        q = torch.round(x / scale) + zero_point
        ctx.save_for_backward((q >= qmin) & (q <= qmax))
        return (q.clamp(qmin, qmax) - zero_point) * scale

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0].float(), None, None, None, None


def straight_through(x, scale, zero_point, qmin, qmax):
    return Stairs.apply(x, scale, zero_point, qmin, qmax)
""",
        "ignores the one from above",
    ),
    Wrong(
        "e2_straight_through",
        "forgets the zero point in the mask",
        """
class Stairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, qmin, qmax):
        steps = torch.round(x / scale)
        ctx.save_for_backward((steps >= qmin) & (steps <= qmax))
        return ((steps + zero_point).clamp(qmin, qmax) - zero_point) * scale

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None, None, None, None


def straight_through(x, scale, zero_point, qmin, qmax):
    return Stairs.apply(x, scale, zero_point, qmin, qmax)
""",
        "with a zero_point the gradient is wrong at the ends",
    ),
    Wrong(
        "e2_straight_through",
        "goes up the ramp forwards as well",
        """
def straight_through(x, scale, zero_point, qmin, qmax):
    return x.clamp((qmin - zero_point - 0.5) * scale, (qmax - zero_point + 0.5) * scale)
""",
        "must lie on the stairs",
    ),
    Wrong(
        "e3_fold",
        "divides by the variance",
        """
def fold(conv, norm):
    factor = norm.weight / (norm.running_var + norm.eps)
    before = 0 if conv.bias is None else conv.bias
    return conv.weight * factor.reshape(-1, 1, 1, 1), norm.bias + (before - norm.running_mean) * factor
""",
        "divide by the square root of the variance",
    ),
    Wrong(
        "e3_fold",
        "leaves out epsilon",
        """
def fold(conv, norm):
    factor = norm.weight / norm.running_var.sqrt()
    before = 0 if conv.bias is None else conv.bias
    return conv.weight * factor.reshape(-1, 1, 1, 1), norm.bias + (before - norm.running_mean) * factor
""",
        "you left eps out",
    ),
    Wrong(
        "e3_fold",
        "adds the running mean",
        """
def fold(conv, norm):
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    before = 0 if conv.bias is None else conv.bias
    return conv.weight * factor.reshape(-1, 1, 1, 1), norm.bias + (before + norm.running_mean) * factor
""",
        "the sign of the running mean is wrong",
    ),
    Wrong(
        "e3_fold",
        "loses the convolution's bias",
        """
def fold(conv, norm):
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return conv.weight * factor.reshape(-1, 1, 1, 1), norm.bias - norm.running_mean * factor
""",
        "the convolution's own bias got lost",
    ),
    Wrong(
        "e3_fold",
        "adds the convolution's bias unscaled",
        """
def fold(conv, norm):
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    bias = norm.bias - norm.running_mean * factor
    return conv.weight * factor.reshape(-1, 1, 1, 1), bias if conv.bias is None else bias + conv.bias
""",
        "must be multiplied by the norm's factor",
    ),
    Wrong(
        "e3_fold",
        "scales the last dimension of the weight",
        """
def fold(conv, norm):
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    before = 0 if conv.bias is None else conv.bias
    return conv.weight * factor, norm.bias + (before - norm.running_mean) * factor
""",
        "the first dimension of the weight",
    ),
    Wrong(
        "e3_fold",
        "folds in place",
        """
def fold(conv, norm):
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    before = 0 if conv.bias is None else conv.bias
    conv.weight.data.mul_(factor.reshape(-1, 1, 1, 1))
    return conv.weight, norm.bias + (before - norm.running_mean) * factor
""",
        "you changed the modules themselves",
    ),
    Wrong(
        "e4_learned_step",
        "detaches round(v), and so loses -v",
        """
def learned_step(weight, step, qmin, qmax):
    c = 1 / math.sqrt(weight.numel() * qmax)
    s = step * c + (step - step * c).detach()
    v = weight / s
    inside = weight * ((v > qmin) & (v < qmax))
    return v.clamp(qmin, qmax).round().detach() * s + inside - inside.detach()
""",
        "the term -v is missing",
    ),
    Wrong(
        "e4_learned_step",
        "gives the step no gradient",
        """
def learned_step(weight, step, qmin, qmax):
    v = weight / step
    inside = weight * ((v > qmin) & (v < qmax))
    return inside + (v.clamp(qmin, qmax).round() * step - inside).detach()
""",
        "the step gets no gradient at all",
    ),
    Wrong(
        "e4_learned_step",
        "gives the step no gradient from clipped weights",
        """
def learned_step(weight, step, qmin, qmax):
    c = 1 / math.sqrt(weight.numel() * qmax)
    s = step * c + (step - step * c).detach()
    v = weight / s
    q = v + (v.round() - v).detach()
    return torch.where((v > qmin) & (v < qmax), q * s, (v.clamp(qmin, qmax).round() * s).detach())
""",
        "beyond the grid it is the grid's end",
    ),
    Wrong(
        "e4_learned_step",
        "forgets the factor",
        """
def learned_step(weight, step, qmin, qmax):
    v = (weight / step).clamp(qmin, qmax)
    return (v + (v.round() - v).detach()) * step
""",
        "is missing in the gradient of the step",
    ),
    Wrong(
        "e4_learned_step",
        "forgets the root in the factor",
        """
def learned_step(weight, step, qmin, qmax):
    c = 1 / (weight.numel() * qmax)
    step = step * c + (step - step * c).detach()
    v = (weight / step).clamp(qmin, qmax)
    return (v + (v.round() - v).detach()) * step
""",
        "the square root is missing",
    ),
    Wrong(
        "e4_learned_step",
        "multiplies the step itself by the factor",
        """
def learned_step(weight, step, qmin, qmax):
    step = step / math.sqrt(weight.numel() * qmax)
    v = (weight / step).clamp(qmin, qmax)
    return (v + (v.round() - v).detach()) * step
""",
        "it changed your value",
    ),
    Wrong(
        "e4_learned_step",
        "divides by the step on one path only",
        """
def learned_step(weight, step, qmin, qmax):
    c = 1 / math.sqrt(weight.numel() * qmax)
    v = (weight / step).clamp(qmin, qmax)
    step = step * c + (step - step * c).detach()
    return (v + (v.round() - v).detach()) * step
""",
        "the factor c",
    ),
    Wrong(
        "e5_compare",
        "the control takes no extra steps",
        compare_with("trained(nn.Identity()), trained(rounding)", "start, trained(rounding)"),
        "the control has not moved",
    ),
    Wrong(
        "e5_compare",
        "rounds the start where the control should be rounded",
        compare_with("rounding(control)", "rounding(start)"),
        "round the control after its extra steps",
    ),
    Wrong(
        "e5_compare",
        "QAT goes on where the control ended",
        compare_with("start.clone().requires_grad_()", "begin.clone().requires_grad_()")
        .replace("def trained(forward):", "def trained(forward, begin):")
        .replace(
            "control, qat = trained(nn.Identity()), trained(rounding)",
            "control = trained(nn.Identity(), start)\n    qat = trained(rounding, control)",
        ),
        "let both begin at `start`",
    ),
    Wrong(
        "e5_compare",
        "trains the start itself",
        compare_with("start.clone().requires_grad_()", "start.requires_grad_()").replace(
            "return {", "start.detach_()\n    return {"
        ),
        "`start` has changed",
    ),
    Wrong(
        "e5_compare",
        "scores the float weights behind QAT",
        compare_with("rounding(qat)", "qat"),
        "score QAT's weights rounded",
    ),
    Wrong(
        "e5_compare",
        "scores on the training rows",
        compare_with("held_out[0] @ weight.T, held_out[1]", "train[0] @ weight.T, train[1]"),
        "you score on the training rows",
    ),
    Wrong(
        "e5_compare",
        "does not set the gradients to zero",
        compare_with("            optimizer.zero_grad()\n", ""),
        "set to zero before each step",
    ),
    Wrong(
        "e5_compare",
        "keeps the learning rate as it is",
        compare_with(" * (1 - t / steps)", ""),
        "your learning rate stays the same",
    ),
    Wrong(
        "e5_compare",
        "is one step ahead in the learning rate",
        compare_with("1 - t / steps", "1 - (t + 1) / steps"),
        "the first step (t = 0) takes the whole learning rate",
    ),
    Wrong(
        "e5_compare",
        "trains QAT without rounding",
        compare_with("trained(rounding)", "trained(nn.Identity())"),
        "your `qat` is the control, rounded",
    ),
    Wrong(
        "e5_compare",
        "keeps the step that is best on the test rows",
        compare_with(
            "            optimizer.step()\n",
            "            optimizer.step()\n"
            "            error = F.mse_loss(held_out[0] @ forward(weight).T, held_out[1]).item()\n"
            "            kept.append((error, weight.detach().clone()))\n",
        )
        .replace("        optimizer = ", "        kept = [(math.inf, start)]\n        optimizer = ")
        .replace("return weight.detach()", "return min(kept, key=lambda pair: pair[0])[1]"),
        "to choose on the test rows",
    ),
]
