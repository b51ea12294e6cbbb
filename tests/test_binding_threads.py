"""ladd._core between Python threads and under signals: models exclude, the GIL is free, Ctrl-C stops a forward and harms nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from test_binding import MMDIT, Array, as_bytes, each_model, forward, make, normal, ones_like, run_script

from ladd import _core


def large() -> tuple[Any, dict[str, Array]]:
    """A model whose forward takes some tenths of a second, in many layers."""
    heads = 4
    config = {**MMDIT, "num_layers": 24, "num_attention_heads": heads, "attention_head_dim": 64, "caption_projection_dim": 64 * heads}
    model = _core.MMDiT({**config, "sample_size": 32, "pos_embed_max_size": 16, "dual_attention_layers": ()})
    model.init(0)
    arguments = {"latents": normal(4, 4, 32, 32), "sigma": normal(4) ** 2, "context": normal(4, 5, 12), "pooled": normal(4, 10)}
    return model, arguments


@each_model
def test_one_model_in_several_python_threads(name: str) -> None:
    """Forwards and backwards of four threads on one model exclude each other: results are those of one thread."""
    model = make(name)
    output, saved = forward(model, name, keep=True)
    dinputs = saved.backward(ones_like(output))
    once = model.flat_grad.copy()
    model.flat_grad[:] = 0
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(8):
                mine, kept = forward(model, name, keep=True)
                assert as_bytes(mine) == as_bytes(output)
                got = kept.backward(ones_like(mine))
                for a, b in zip(*(p if isinstance(p, (list, tuple)) else [p] for p in (dinputs, got)), strict=True):
                    assert a.tobytes() == b.tobytes()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert np.allclose(model.flat_grad, 32 * once, rtol=1e-5, atol=1e-5 * np.abs(once).max())


def test_other_python_threads_run_during_a_forward() -> None:
    model, arguments = large()
    start = time.perf_counter()
    model.forward(**arguments)
    alone = time.perf_counter() - start
    thread = threading.Thread(target=lambda: model.forward(**arguments))
    longest, last = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        time.sleep(0.001)
    thread.join()
    assert longest < max(0.5 * alone, 0.05), f"the interpreter stood still for {longest:.3f} s of {alone:.3f} s"


INTERRUPT = """
    import os, signal, sys, threading, time
    sys.path.insert(0, {tests!r})
    import numpy as np
    import test_binding as t
    from test_binding_threads import large
    from ladd import _core

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start background processes with SIGINT ignored
    model, arguments = large()
    in_use = _core.memory_in_use()
    small = {{name: value[:1] for name, value in arguments.items()}}
    wanted, _ = model.forward(**small)

    def seconds(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def interrupted(call, whole):
        after = 0.3 * whole
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.perf_counter()
        try:
            call()
        except KeyboardInterrupt:
            return (time.perf_counter() - start - after) / whole
        raise SystemExit("the call came to its end")

    forward = lambda: model.forward(**arguments)
    print(interrupted(forward, seconds(forward)))
    assert _core.memory_in_use() == in_use
    out, saved = model.forward(**arguments, keep=True)
    cotangent = np.ones_like(out)
    whole = seconds(lambda: saved.backward(cotangent))
    out, saved = model.forward(**arguments, keep=True)
    print(interrupted(lambda: saved.backward(cotangent), whole))
    assert _core.memory_in_use() == in_use
    model.flat_grad[:] = 0
    again, saved = model.forward(**small, keep=True)
    assert again.tobytes() == wanted.tobytes()
    saved.backward(np.ones_like(again))
    assert np.isfinite(model.flat_grad).all() and model.flat_grad.any()
"""


def test_ctrl_c_stops_between_layers_and_the_model_stays_usable() -> None:
    for attempt in range(5):  # on a busy machine a call can end before its signal comes, and say nothing of either
        try:
            late = [float(line) for line in run_script(INTERRUPT.format(tests=os.path.dirname(__file__))).split()]
            assert len(late) == 2 and max(late) < 0.6, f"came {late} of the whole call's time after the signal"
            return
        except AssertionError:
            if attempt == 4:
                raise


def test_a_signal_handler_that_raises_is_what_is_raised() -> None:
    class Alarm(Exception):
        pass

    def ring(*_: Any) -> None:
        raise Alarm

    model, arguments = large()
    model.forward(**arguments)
    start = time.perf_counter()
    model.forward(**arguments)
    whole = time.perf_counter() - start
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1 * whole)
        with pytest.raises(Alarm):
            model.forward(**arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_handler_cannot_use_the_model_that_it_interrupts() -> None:
    """It would wait for its own thread for ever. Another model is free, and what was interrupted goes on as if nothing had been."""
    model, arguments = large()
    wanted, other = model.forward(**arguments)[0], make("MMDiT")
    refused: list[str] = []

    def ring(*_: Any) -> None:
        forward(other, "MMDiT")
        for call in (lambda: model.forward(**arguments), model.gradients, lambda: model.flat_grad):
            with pytest.raises(RuntimeError) as error:
                call()
            refused.append(str(error.value))

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for delay in (0.1, 0.01, 0.003, 0.001):  # until one comes in the middle of a call
            signal.setitimer(signal.ITIMER_REAL, delay)
            try:
                assert model.forward(**arguments)[0].tobytes() == wanted.tobytes()
            except BaseException as error:  # the handler ran between two calls, where nothing is to be refused
                assert "DID NOT RAISE" in str(error)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if refused:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(refused) == 3 and all("signal handler" in text for text in refused)


FORK = """
    import os, signal, sys, threading
    sys.path.insert(0, {tests!r})
    import test_binding as t

    busy, own = t.make("MMDiT"), t.make("MMDiT")
    wanted = t.forward(own, "MMDiT")[0].tobytes()
    going = True

    def work():
        while going:
            output, saved = t.forward(busy, "MMDiT", keep=True)
            saved.backward(output)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    results = []
    for _ in range(40):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends a child that waits for a lock of a thread that it does not have
            os._exit(0 if t.forward(own, "MMDiT")[0].tobytes() == wanted else 1)
        results.append(os.waitpid(child, 0)[1])
    going = False
    assert not any(results), results
"""


def test_children_of_a_fork_compute_while_threads_of_their_parent_did() -> None:
    run_script(FORK.format(tests=os.path.dirname(__file__)))
