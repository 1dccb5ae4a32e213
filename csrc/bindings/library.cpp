// All that knows torch, as one translation unit: reading torch's headers takes longer than compiling these files.
#include "scan.cpp"
#include "correction.cpp"
#include "layer.cpp"
#include "projection.cpp"
#include "fingerprint.cpp"
