"""The ONNX opset of every exported graph."""

# 22 is the first in which Conv takes bfloat16; 23 would bring Attention and RMSNormalization nodes that TensorRT
# either fuses whole or refuses.
OPSET = 22
