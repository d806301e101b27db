"""What follows what in a model: by `torch.fx`, which runs the model's code on symbols and needs no example input."""

from torch import fx, nn

RELUS = {nn.ReLU: float("inf"), nn.ReLU6: 6.0}  # the greatest value that each lets through


class _Tracer(fx.Tracer):
    """Takes convolutions and batch norms for single steps, also those that a library has derived its own from."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of the model in evaluation mode. Raises ValueError where its code cannot be traced."""
    modes = {module: module.training for module in model.modules()}
    try:
        return _without_identities(model, _Tracer().trace(model.eval()))
    except Exception as error:  # whatever the model's own code raises when it meets a symbol
        message = f"{type(model).__name__} cannot be traced for its batch norms ({error}): say which convolution"
        raise ValueError(message + ' each belongs to, as pairs={"conv": "bn"}, or pairs={} for none') from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def _without_identities(model: nn.Module, graph: fx.Graph) -> fx.Graph:
    for node in graph.nodes:
        if node.op == "call_module" and type(model.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def calls(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Every place where a module is called, by the module's name."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            found.setdefault(node.target, []).append(node)
    return found


def foldable(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether batch norm `norm` can be folded into `conv`: plain, or timm's with an activation inside."""
    plain = type(norm) is nn.BatchNorm2d or activation_of(norm) is not None
    counted = plain and norm.affine and norm.track_running_stats
    return counted and type(conv) is nn.Conv2d and conv.out_channels == norm.num_features


def activation_of(norm: nn.Module) -> nn.Module | None:
    """What timm's BatchNormAct2d does after it has normalized (its `drop`, then its `act`); None for others."""
    if not isinstance(norm, nn.BatchNorm2d) or type(norm).__name__ != "BatchNormAct2d":
        return None
    return norm.act if isinstance(norm.drop, nn.Identity) else nn.Sequential(norm.drop, norm.act)


def find_pairs(model: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """{convolution: batch norm}, for each that is called once and whose output goes nowhere else."""
    modules, called, pairs = dict(model.named_modules(remove_duplicate=False)), calls(graph), {}
    for name, nodes in called.items():
        nexts = list(nodes[0].users)
        if len(nodes) == len(nexts) == 1 and nexts[0].op == "call_module":
            follower = nexts[0].target
            if len(called[follower]) == 1 and foldable(modules[name], modules[follower]):
                pairs[name] = follower
    return pairs


def find_relus(model: nn.Module, graph: fx.Graph, pairs: dict[str, str]) -> dict[str, list[str]]:
    """{ReLU or ReLU6, or folded batch norm with one inside: the layers that alone take its output}."""
    modules, called, folded = dict(model.named_modules(remove_duplicate=False)), calls(graph), set(pairs.values())
    found = {}
    for name, nodes in called.items():
        step = activation_of(modules[name]) if name in folded else modules[name]
        users = list(nodes[0].users)
        if type(step) in RELUS and len(nodes) == 1 and all(user.op == "call_module" for user in users):
            takers = [user.target for user in users]
            if takers and all(len(called[taker]) == 1 for taker in takers):
                found[name] = takers
    return found
