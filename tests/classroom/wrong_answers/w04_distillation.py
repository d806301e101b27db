"""Plausible wrong answers to the exercises of chapter 4."""

from tests.classroom.gate import Wrong

WRONG = [
    Wrong("e1_schedule", "every stage has all the steps", '''
def width_of_each_step(widths, steps):
    return [width for width in widths for _ in range(steps)]
''', "all stages together share the steps"),
    Wrong("e1_schedule", "drops the remainder", '''
def width_of_each_step(widths, steps):
    return [width for width in widths for _ in range(steps // len(widths))]
''', "steps that are left over belong to the last width"),
    Wrong("e1_schedule", "gives the remainder to the first stage", '''
def width_of_each_step(widths, steps):
    length = steps // len(widths)
    return [widths[0]] * (steps % len(widths)) + [width for width in widths for _ in range(length)]
''', "leave the rest to the last stage"),
    Wrong("e1_schedule", "rounds the length of a stage up", '''
def width_of_each_step(widths, steps):
    length = -(-steps // len(widths))
    return [widths[step // length] for step in range(steps)]
''', "round down"),
    Wrong("e1_schedule", "takes turns", '''
def width_of_each_step(widths, steps):
    return [widths[step % len(widths)] for step in range(steps)]
''', "finish one stage before you begin the next"),
    Wrong("e1_schedule", "sorts", '''
def width_of_each_step(widths, steps):
    length = steps // len(widths)
    widths = sorted(widths, reverse=True)
    return [widths[min(step // length, len(widths) - 1)] for step in range(steps)]
''', "do not sort them"),
    Wrong("e1_schedule", "returns the example", '''
def width_of_each_step(widths, steps):
    return [2, 2, 3, 3, 4, 4] if steps == 6 else [8, 8, 6, 6, 4, 4, 2, 2, 2, 2]
''', "steps: expected"),
    Wrong("e2_loss", "swaps teacher and student", '''
def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha):
    log_q, log_p = F.log_softmax(student_logits / temperature, -1), F.log_softmax(teacher_logits / temperature, -1)
    soft = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)
''', "this is KL(student || teacher)"),
    Wrong("e2_loss", "forgets T squared", '''
def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha):
    log_q, log_p = F.log_softmax(student_logits / temperature, -1), F.log_softmax(teacher_logits / temperature, -1)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)
''', "T^2 is missing"),
    Wrong("e2_loss", "multiplies by T once", '''
def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha):
    log_q, log_p = F.log_softmax(student_logits / temperature, -1), F.log_softmax(teacher_logits / temperature, -1)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * temperature * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)
''', "you multiply by T"),
    Wrong("e2_loss", "averages over classes, too", '''
def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha):
    log_q, log_p = F.log_softmax(student_logits / temperature, -1), F.log_softmax(teacher_logits / temperature, -1)
    soft = (log_p.exp() * (log_p - log_q)).mean()
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)
''', "use 'batchmean'"),
    Wrong("e2_loss", "sums over the batch", '''
def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha):
    p, q = (F.softmax(z / temperature, -1) for z in (teacher_logits, student_logits))
    soft = (p * (p / q).log()).sum()
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)
''', "divide by their number"),
    Wrong("e2_loss", "exchanges the weights", '''
def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha):
    log_q, log_p = F.log_softmax(student_logits / temperature, -1), F.log_softmax(teacher_logits / temperature, -1)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return (1 - alpha) * temperature**2 * soft + alpha * F.cross_entropy(student_logits, labels)
''', "alpha is the weight of the teacher"),
    Wrong("e2_loss", "softens the cross-entropy", '''
def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha):
    student, teacher = student_logits / temperature, teacher_logits / temperature
    soft = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean")
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)
''', "you soften the student for the labels, too"),
    Wrong("e2_loss", "probabilities where log_target wants logarithms", '''
def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha):
    log_q, p = F.log_softmax(student_logits / temperature, -1), F.softmax(teacher_logits / temperature, -1)
    soft = F.kl_div(log_q, p, reduction="batchmean", log_target=True)
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)
''', "with T=1 and alpha=1 the loss is"),
    Wrong("e2_loss", "softmax over the batch", '''
def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha):
    log_q, log_p = F.log_softmax(student_logits / temperature, 0), F.log_softmax(teacher_logits / temperature, 0)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)
''', "with T=1 and alpha=1 the loss is"),
    Wrong("e2_loss", "does not weigh the cross-entropy", '''
def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha):
    log_q, log_p = F.log_softmax(student_logits / temperature, -1), F.log_softmax(teacher_logits / temperature, -1)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * temperature**2 * soft + (alpha < 1) * F.cross_entropy(student_logits, labels)
''', "three quarters of the cross-entropy"),
    Wrong("e3_step", "leaves the teacher in training mode", '''
def distillation_step(student, teacher, inputs, optimizer):
    student.train()
    with torch.no_grad():
        wanted = teacher(inputs)
    loss = F.mse_loss(student(inputs), wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
''', "call teacher.eval()"),
    Wrong("e3_step", "leaves the student in evaluation mode", '''
def distillation_step(student, teacher, inputs, optimizer):
    teacher.eval()
    with torch.no_grad():
        wanted = teacher(inputs)
    loss = F.mse_loss(student(inputs), wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
''', "call student.train()"),
    Wrong("e3_step", "forgets no_grad: eval mode does not stop gradients", '''
def distillation_step(student, teacher, inputs, optimizer):
    student.train()
    teacher.eval()
    loss = F.mse_loss(student(inputs), teacher(inputs))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
''', "the teacher has gradients"),
    Wrong("e3_step", "runs both under no_grad", '''
def distillation_step(student, teacher, inputs, optimizer):
    student.train()
    teacher.eval()
    with torch.no_grad():
        loss = F.mse_loss(student(inputs), teacher(inputs))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
''', "only the teacher belongs under torch.no_grad()"),
    Wrong("e3_step", "detaches the student", '''
def distillation_step(student, teacher, inputs, optimizer):
    student.train()
    teacher.eval()
    loss = F.mse_loss(student(inputs).detach(), teacher(inputs))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
''', "the student has not moved"),
    Wrong("e3_step", "never steps", '''
def distillation_step(student, teacher, inputs, optimizer):
    student.train()
    teacher.eval()
    with torch.no_grad():
        wanted = teacher(inputs)
    loss = F.mse_loss(student(inputs), wanted)
    optimizer.zero_grad()
    loss.backward()
    return loss.item()
''', "the optimizer must step"),
    Wrong("e3_step", "zeroes the gradients after backward", '''
def distillation_step(student, teacher, inputs, optimizer):
    student.train()
    teacher.eval()
    with torch.no_grad():
        wanted = teacher(inputs)
    loss = F.mse_loss(student(inputs), wanted)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()
''', "the student has not moved"),
    Wrong("e3_step", "lets gradients pile up", '''
def distillation_step(student, teacher, inputs, optimizer):
    student.train()
    teacher.eval()
    with torch.no_grad():
        wanted = teacher(inputs)
    loss = F.mse_loss(student(inputs), wanted)
    loss.backward()
    optimizer.step()
    return loss.item()
''', "call optimizer.zero_grad()"),
    Wrong("e3_step", "sums the squared errors", '''
def distillation_step(student, teacher, inputs, optimizer):
    student.train()
    teacher.eval()
    with torch.no_grad():
        wanted = teacher(inputs)
    loss = F.mse_loss(student(inputs), wanted, reduction="sum")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
''', "the mean squared error before the step is"),
    Wrong("e4_hidden", "averages over padding", '''
def hidden_loss(student_hidden, teacher_hidden, mask):
    return F.mse_loss(student_hidden, teacher_hidden)
''', "the padding is in your mean"),
    Wrong("e4_hidden", "masks, then divides by all positions", '''
def hidden_loss(student_hidden, teacher_hidden, mask):
    return ((student_hidden - teacher_hidden) ** 2 * mask[:, :, None]).mean()
''', "you divide by all positions"),
    Wrong("e4_hidden", "forgets the width", '''
def hidden_loss(student_hidden, teacher_hidden, mask):
    return ((student_hidden - teacher_hidden) ** 2 * mask[:, :, None]).sum() / mask.sum()
''', "divide by tokens times width"),
    Wrong("e4_hidden", "averages within sentences first", '''
def hidden_loss(student_hidden, teacher_hidden, mask):
    errors = ((student_hidden - teacher_hidden) ** 2).mean(-1) * mask
    return (errors.sum(1) / mask.sum(1)).mean()
''', "you average within each sentence first"),
    Wrong("e4_hidden", "indexes with integers", '''
def hidden_loss(student_hidden, teacher_hidden, mask):
    return F.mse_loss(student_hidden[mask], teacher_hidden[mask])
''', "turn it into bool"),
    Wrong("e4_hidden", "keeps the padding", '''
def hidden_loss(student_hidden, teacher_hidden, mask):
    return F.mse_loss(student_hidden[mask == 0], teacher_hidden[mask == 0])
''', "the mask is 1 at a token"),
    Wrong("e4_hidden", "takes the mean of one token at a time", '''
def hidden_loss(student_hidden, teacher_hidden, mask):
    return ((student_hidden - teacher_hidden) ** 2).mean(-1) * mask
''', "take one mean over all real tokens"),
    Wrong("e4_hidden", "returns a constant", '''
def hidden_loss(student_hidden, teacher_hidden, mask):
    return 3 + 0 * student_hidden.sum()
''', "real tokens"),
    Wrong("e5_bits", "ignores the budget", '''
def spend(harm, size, budget):
    if sum(min(of.values()) for of in size.values()) > budget:
        raise ValueError("too little")
    return {name: min(of, key=of.get) for name, of in harm.items()}
''', "keep only the plans whose sum of bytes is within the budget"),
    Wrong("e5_bits", "minimises the bytes", '''
def spend(harm, size, budget):
    if sum(min(of.values()) for of in size.values()) > budget:
        raise ValueError("too little")
    return {name: min(of, key=of.get) for name, of in size.items()}
''', "minimise the harm, not the size"),
    Wrong("e5_bits", "does not spend the last byte", '''
def spend(harm, size, budget):
    plans = [dict(zip(harm, bits)) for bits in itertools.product(*harm.values())]
    plans = [plan for plan in plans if sum(size[n][b] for n, b in plan.items()) < budget]
    if not plans:
        raise ValueError("too little")
    return min(plans, key=lambda plan: sum(harm[n][b] for n, b in plan.items()))
''', "compare with <="),
    Wrong("e5_bits", "one width for all", '''
def spend(harm, size, budget):
    plans = [dict.fromkeys(harm, bits) for bits in next(iter(harm.values()))]
    plans = [plan for plan in plans if sum(size[n][b] for n, b in plan.items()) <= budget]
    if not plans:
        raise ValueError("too little")
    return min(plans, key=lambda plan: sum(harm[n][b] for n, b in plan.items()))
''', "every layer has the same width"),
    Wrong("e5_bits", "narrows greedily, least harm per byte first", '''
def spend(harm, size, budget):
    plan = {name: max(of) for name, of in harm.items()}
    while sum(size[n][b] for n, b in plan.items()) > budget:
        trades = [(harm[n][b] - harm[n][plan[n]], size[n][plan[n]] - size[n][b], n, b)
                  for n in plan for b in harm[n] if b < plan[n]]
        if not trades:
            raise ValueError("too little")
        _, name, bits = min((more / saved, n, b) for more, saved, n, b in trades)
        plan[name] = bits
    return plan
''', "try all combinations"),
    Wrong("e5_bits", "shares the budget equally among the layers", '''
def spend(harm, size, budget):
    if sum(min(of.values()) for of in size.values()) > budget:
        raise ValueError("too little")
    share = budget / len(harm)
    return {name: max((b for b in of if of[b] <= share), default=min(of)) for name, of in size.items()}
''', "unequal shares"),
    Wrong("e5_bits", "spends as many bytes as it can", '''
def spend(harm, size, budget):
    plans = [dict(zip(harm, bits)) for bits in itertools.product(*harm.values())]
    plans = [plan for plan in plans if sum(size[n][b] for n, b in plan.items()) <= budget]
    return max(plans, key=lambda plan: sum(size[n][b] for n, b in plan.items()))
''', "more bits are not always better"),
    Wrong("e5_bits", "returns the narrowest plan if none fits", '''
def spend(harm, size, budget):
    plans = [dict(zip(harm, bits)) for bits in itertools.product(*harm.values())]
    plans = [plan for plan in plans if sum(size[n][b] for n, b in plan.items()) <= budget]
    if not plans:
        return {name: min(of, key=of.get) for name, of in size.items()}
    return min(plans, key=lambda plan: sum(harm[n][b] for n, b in plan.items()))
''', "raise a ValueError instead"),
    Wrong("e5_bits", "minimises the worst layer, not the sum", '''
def spend(harm, size, budget):
    plans = [dict(zip(harm, bits)) for bits in itertools.product(*harm.values())]
    plans = [plan for plan in plans if sum(size[n][b] for n, b in plan.items()) <= budget]
    return min(plans, key=lambda plan: max(harm[n][b] for n, b in plan.items()))
''', "narrowing `a` alone fits into 26 bytes"),
]  # fmt: skip
