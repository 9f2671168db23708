"""Serving: the Open Inference Protocol v2 over HTTP, on onnxruntime alone, and a playground page.

    settings      `Limits`: everything that bounds a server, one object
    models        files -> verified models with names
    batching      requests that wait become one batch, within a latency budget
    tensors       inference requests and answers: JSON, and Triton's binary extension
    intake        request bodies, bounded in size, memory and time
    corruptions   a few corruptions in numpy, for the playground
    pictures      an uploaded picture -> the tensor a model takes
    metrics       what Prometheus reads
    engine        models, batchers and counters of one server
    app           the ASGI application
    guard         what every request passes: token, overload, draining, counting
    server        uvicorn with a time limit on headers and a graceful end
    replicas      what the replicas of a deployment have in common
    ray_engine    the application as a deployment of Ray Serve
    ray_local     a Ray of our own on this machine
    page          the playground: static files

Nothing here imports torch, nor what needs it: a machine that serves does not have it.
"""
