"""Export: ONNX behind a parity gate, a careful way to run it, predictions, benchmarks.

    onnx_export   torch module -> one self-contained `.onnx` file and its manifest
    parity        the gate: the graph against the module in float32 and float64
    graph         what an ONNX graph may hold: checks before it is run, strips before it is shipped
    manifest      the JSON beside the file: SHA-256, classes, parity figures
    runtime       `OnnxClassifier`, the checked file on onnxruntime
    predict       image files -> labels and probabilities
    bench         interleaved latency measurements of several contenders

Import from the modules; nothing heavy is loaded before it is needed.
"""
