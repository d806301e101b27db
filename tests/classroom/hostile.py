"""Answers that a teacher's machine must survive. `step` is the function of the tests' tiny exercise."""

RIGHT = """
def step(low, high, bits):
    return (high - low) / (2**bits - 1)
"""
UNPAID = {
    "wrong": """
def step(low, high, bits):
    return (high - low) / 2**bits
""",
    "constant": """
def step(low, high, bits):
    return 1 / 15
""",
    "checker": """
torch.allclose = lambda *a, **k: True
def step(low, high, bits):
    return 7.0
""",
    "error": """
import builtins
builtins.AssertionError = Warning
def step(low, high, bits):
    return 7.0
""",
    "leaves": """
import os
def step(low, high, bits):
    os._exit(0)
""",
    "printer": """
for _ in range(1 << 14):
    print("x" * (1 << 16))
def step(low, high, bits):
    return (high - low) / (2**bits - 1)
""",
    "loop": """
def step(low, high, bits):
    while True:
        pass
""",
}
PAID = {
    "warns": "import warnings\n" + RIGHT.replace("    return", "    warnings.warn('careful')\n    return"),
    "script": "from IPython.display import HTML, display\ndisplay(HTML('<script>steal()</script>'))\n" + RIGHT,
}
# Without walls these would do what they say. But for the first, they are right only where the walls have held.
BOXED = {
    "memory": """
def step(low, high, bits):
    return len(bytearray(30 << 30))
""",
    "forks": """
import os, time
def step(low, high, bits):
    try:
        while True:
            if os.fork() == 0:
                time.sleep(600)
    except OSError:
        return (high - low) / (2**bits - 1)
""",
    "writes": """
import os
def step(low, high, bits):
    for path in PATHS:
        try:
            open(path, "w").write("escaped")
        except OSError:
            continue
    return (high - low) / (2**bits - 1)
""",
    "reads": """
import os
def step(low, high, bits):
    assert os.getuid() != 0 and not any(map(os.path.exists, PATHS)), "it can see " + str(PATHS)
    return (high - low) / (2**bits - 1)
""",
    "network": """
import socket
def step(low, high, bits):
    try:
        socket.create_connection(("1.1.1.1", 80), 2)
    except OSError:
        return (high - low) / (2**bits - 1)
    raise SystemExit
""",
}
