// Names and discovery of instruction sets, for the bindings.
#pragma once
#include <string>
#include <vector>

#include "kernel.h"

namespace lowp {

const char* isa_name(Isa isa);
Isa isa_from_name(const std::string& name);  // throws std::invalid_argument
std::vector<std::string> cpu_features();     // what CPUID and the OS both allow

}  // namespace lowp
