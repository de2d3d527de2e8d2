import sys, time, torch

sys.path.insert(0, "benchmarks")
import vcpo
from torch.profiler import profile, ProfilerActivity

print(torch.cuda.get_device_name(), flush=True)
p = vcpo.Problem.make()
print("made", flush=True)
for size in (8,):
    for name, f in (("grpo", vcpo.grpo), ("ghost", vcpo.ghost)):
        print(name, size, vcpo.measured(f, p, size), flush=True)
for name, f in (("grpo", vcpo.grpo), ("ghost", vcpo.ghost)):
    p.optimizer.zero_grad(set_to_none=True)
    s = time.perf_counter()
    f(p, 8)
    host = time.perf_counter() - s
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        f(p, 8)
        torch.cuda.synchronize()
    events = prof.key_averages()
    total = sum(e.self_device_time_total for e in events)
    print(name, "GPU busy", total / 1e6, "s a step", flush=True)
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:26]:
        print(f"   {e.self_device_time_total / 1e3:9.1f} ms {e.count:6d}  {e.key[:110]}")
