// All that knows torch, as one translation unit: reading torch's headers takes longer than compiling these files.
#include "bindings.cpp"
#include "bindings_correction.cpp"
#include "bindings_layer.cpp"
#include "bindings_projection.cpp"
#include "fingerprint.cpp"
