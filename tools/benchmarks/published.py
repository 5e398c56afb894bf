"""What is published of RepLKNet's speed: its Tables 1 and 6, in float32 on one 2080 Ti."""

CARD = '2080 Ti'
TABLE_1_KERNELS = (3, 5, 7, 9, 13, 17, 21, 27, 29, 31)
# milliseconds of 24 depthwise layers, forward, on (64, 384, R, R), by R: of PyTorch, and of the authors'
TABLE_1 = {
    16: {'PyTorch': (5.6, 11.0, 14.4, 17.6, 36.0, 57.2, 83.4, 133.5, 150.7, 171.4),
         "the authors'": (5.6, 6.5, 6.4, 6.9, 7.5, 8.4, 8.4, 8.4, 8.3, 8.4)},
    32: {'PyTorch': (21.9, 34.1, 54.8, 76.1, 141.2, 230.5, 342.3, 557.8, 638.6, 734.8),
         "the authors'": (21.9, 28.7, 34.6, 40.6, 52.5, 64.5, 73.9, 87.9, 92.7, 96.7)},
    64: {'PyTorch': (69.6, 141.2, 228.6, 319.8, 600.0, 977.7, 1454.4, 2371.1, 2698.4, 3090.4),
         "the authors'": (69.6, 112.6, 130.7, 152.6, 199.7, 251.5, 301.0, 378.2, 406.0, 431.7)},
}
TABLE_1_BATCH, TABLE_1_CHANNELS, TABLE_1_LAYERS = 64, 384, 24
# images/s in inference, batch 64, by model and pixels a side
TABLE_6 = {('RepLKNet-31B', 224): 295.5, ('RepLKNet-31B', 384): 97.0, ('RepLKNet-31L', 384): 50.2,
           ('RepLKNet-XL', 320): 39.1}
TABLE_6_BATCH = 64
