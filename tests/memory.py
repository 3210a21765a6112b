from torch.profiler import ProfilerActivity, profile


def allocated_peak(function):
    """Largest sum of live bytes that the CPU allocator handed out while `function` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as profiler:
        result = function()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del result
    return peak
