// Compiles HLSL with the DirectX shader compiler, for as long as there are requests.
//
// A request on standard input, all numbers little-endian:
//   u32 number of arguments; each: u32 length, text; u32 length, source
// The answer on standard output: u32 success; u32 length, messages; u32 length, object
#include "dxcapi.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <vector>

static std::string text() {
    uint32_t length;
    if (fread(&length, 4, 1, stdin) != 1) exit(0); // the other side is gone
    std::string s(length, ' ');
    if (fread(s.data(), 1, length, stdin) != length) exit(0);
    return s;
}

static void write(const void* bytes, uint32_t length) {
    fwrite(&length, 4, 1, stdout);
    fwrite(bytes, 1, length, stdout);
}

int main() {
    void* library = dlopen("libdxcompiler.so", RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    auto create = reinterpret_cast<DxcCreateInstanceProc>(dlsym(library, "DxcCreateInstance"));
    IDxcCompiler3* compiler = nullptr;
    if (!create || create(CLSID_DxcCompiler, __uuidof(IDxcCompiler3), reinterpret_cast<void**>(&compiler)) != S_OK) return 2;
    for (;;) {
        uint32_t count;
        if (fread(&count, 4, 1, stdin) != 1) return 0;
        std::vector<std::wstring> words;
        for (uint32_t i = 0; i < count; i++) {
            std::string word = text();
            words.emplace_back(word.begin(), word.end());
        }
        std::vector<LPCWSTR> arguments;
        for (auto& word : words) arguments.push_back(word.c_str());
        std::string source = text();
        DxcBuffer buffer = {source.data(), source.size(), DXC_CP_UTF8};
        IDxcResult* result = nullptr;
        HRESULT status = compiler->Compile(&buffer, arguments.data(), arguments.size(), nullptr, __uuidof(IDxcResult), reinterpret_cast<void**>(&result));
        IDxcBlobUtf8* messages = nullptr;
        IDxcBlob* object = nullptr;
        if (status == S_OK) {
            result->GetOutput(DXC_OUT_ERRORS, __uuidof(IDxcBlobUtf8), reinterpret_cast<void**>(&messages), nullptr);
            result->GetStatus(&status);
            if (status == S_OK) result->GetOutput(DXC_OUT_OBJECT, __uuidof(IDxcBlob), reinterpret_cast<void**>(&object), nullptr);
        }
        uint32_t success = object != nullptr;
        fwrite(&success, 4, 1, stdout);
        write(messages ? messages->GetStringPointer() : "", messages ? messages->GetStringLength() : 0);
        write(object ? object->GetBufferPointer() : "", object ? object->GetBufferSize() : 0);
        fflush(stdout);
        if (object) object->Release();
        if (messages) messages->Release();
        if (result) result->Release();
    }
}
