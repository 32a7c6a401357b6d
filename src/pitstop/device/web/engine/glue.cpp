// What the page's engine needs of llama.cpp, as plain C functions: one base, one context, adapters, samplers.
//
// Every evaluation names its adapter (null: the plain base) and its sequence; there is no other way to evaluate.
// A call that fails returns null or a negative number, and `reason` tells why in llama.cpp's own words.

#include "common.h"
#include "ggml-cpu.h"
#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json-schema-to-grammar.h"
#include "llama.h"

#include <emscripten.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

llama_model * model = nullptr;
llama_context * context = nullptr;
ggml_threadpool * threadpool = nullptr;
llama_batch batch;
const llama_vocab * vocabulary = nullptr;
std::string why;   // the error lines of the call that failed last
std::string text;  // what the call before returned

void on_log(ggml_log_level level, const char * line, void *) {
    static bool is_error = false;
    is_error = level == GGML_LOG_LEVEL_CONT ? is_error : level == GGML_LOG_LEVEL_ERROR;
    if (is_error) why += line;
}

// Runs what may throw, from a clean slate; a failure becomes `failed`.
template <typename Result, typename Body> Result guarded(Result failed, Body body) {
    why.clear();
    try {
        return body();
    } catch (const std::exception & error) {
        if (why.empty()) why = error.what();
    } catch (...) {
        if (why.empty()) why = "an error without words";
    }
    return failed;
}

// A template's own `raise_exception`: its words alone, without the listing of the template that comes with them.
jinja::value refuse(const jinja::func_args & args) {
    why = args.get_pos(0)->as_string().str();
    throw std::runtime_error(why);
}

const char * returned(std::string what) {
    text = std::move(what);
    return text.c_str();
}

void open_context(int context_length, int sequences, int batch_size, int threads) {
    auto params = llama_context_default_params();
    params.n_ctx = context_length * sequences;
    params.n_seq_max = sequences;
    params.n_batch = params.n_ubatch = batch_size;
    params.n_outputs_max = sequences;  // one row of logits for each sequence bounds that buffer
    params.n_threads = params.n_threads_batch = threads;
    params.kv_unified = false;  // a stream for each sequence: what others hold cannot move a bit of its logits
    params.swa_full = true;     // else a sliding window forgets what a shortened conversation would answer from
    context = llama_init_from_model(model, params);
    if (!context) throw std::runtime_error("no memory for the conversations");
    batch = llama_batch_init(batch_size, 0, 1);
    if (threads > 1) {
        auto pool = ggml_threadpool_params_default(threads);
        threadpool = ggml_threadpool_new(&pool);
        if (!threadpool) throw std::runtime_error("the threads cannot be started");
        llama_attach_threadpool(context, threadpool, threadpool);
    }
}

}  // namespace

extern "C" {

EMSCRIPTEN_KEEPALIVE const char * engine_reason() { return why.c_str(); }

EMSCRIPTEN_KEEPALIVE void engine_free() {
    if (context) {
        llama_free(context);
        llama_batch_free(batch);
    }
    if (threadpool) ggml_threadpool_free(threadpool);
    if (model) llama_model_free(model);  // and its adapters
    context = nullptr, threadpool = nullptr, model = nullptr;
}

EMSCRIPTEN_KEEPALIVE int engine_load(const char * path) {
    llama_log_set(on_log, nullptr);
    return guarded(-1, [&] {
        auto params = llama_model_default_params();
        params.load_mode = LLAMA_LOAD_MODE_NONE;
        model = llama_model_load_from_file(path, params);
        if (!model) return -1;
        vocabulary = llama_model_get_vocab(model);
        return 0;
    });
}

// About what one token of a conversation takes of memory: keys and values of 16 bits in every layer.
EMSCRIPTEN_KEEPALIVE int engine_token_bytes() {
    int head = llama_model_n_embd(model) / std::max(llama_model_n_head(model), 1);
    return llama_model_n_layer(model) * llama_model_n_head_kv(model) * head * 2 * 2;
}

EMSCRIPTEN_KEEPALIVE int engine_open(int context_length, int sequences, int batch_size, int threads) {
    return guarded(-1, [&] {
        open_context(context_length, sequences, batch_size, threads);
        return 0;
    });
}

EMSCRIPTEN_KEEPALIVE int engine_vocabulary() { return llama_vocab_n_tokens(vocabulary); }

EMSCRIPTEN_KEEPALIVE llama_adapter_lora * adapter_load(const char * path) {
    return guarded<llama_adapter_lora *>(nullptr, [&] { return llama_adapter_lora_init(model, path); });
}

EMSCRIPTEN_KEEPALIVE void adapter_free(llama_adapter_lora * adapter) { llama_adapter_lora_free(adapter); }

// The digest of the base file an adapter was trained on; empty where it does not say.
EMSCRIPTEN_KEEPALIVE const char * adapter_base(llama_adapter_lora * adapter) {
    char digest[65] = "";
    llama_adapter_meta_val_str(adapter, "pitstop.base_sha256", digest, sizeof(digest));
    return returned(digest);
}

EMSCRIPTEN_KEEPALIVE bool adapter_is_activated(llama_adapter_lora * adapter) {
    return llama_adapter_get_alora_n_invocation_tokens(adapter) > 0;
}

EMSCRIPTEN_KEEPALIVE int text_tokens(const char * words, int size, llama_token * tokens, int room) {
    return guarded(-1, [&] { return llama_tokenize(vocabulary, words, size, tokens, room, false, true); });
}

// The bytes of one token, special ones have none; they need not be whole UTF-8.
EMSCRIPTEN_KEEPALIVE int token_bytes(llama_token token, char * bytes, int room) {
    return llama_token_to_piece(vocabulary, token, bytes, room, 0, false);
}

EMSCRIPTEN_KEEPALIVE bool token_ends(llama_token token) { return llama_vocab_is_eog(vocabulary, token); }

// Keeps the first tokens of a sequence and returns how many are left: none where the model cannot keep some.
EMSCRIPTEN_KEEPALIVE int sequence_cut(int sequence, int length) {
    auto memory = llama_get_memory(context);
    if (length > 0 && llama_memory_seq_rm(memory, sequence, length, -1)) return length;
    llama_memory_seq_rm(memory, sequence, -1, -1);
    return 0;
}

EMSCRIPTEN_KEEPALIVE int sequence_decode(
    llama_adapter_lora * adapter, float scale, int sequence, int position, const llama_token * tokens, int count) {
    return guarded(-1, [&] {
        llama_set_adapters_lora(context, adapter ? &adapter : nullptr, adapter ? 1 : 0, adapter ? &scale : nullptr);
        batch.n_tokens = count;
        for (int i = 0; i < count; i++) {
            batch.token[i] = tokens[i];
            batch.pos[i] = position + i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = sequence;
            batch.logits[i] = i == count - 1;
        }
        return llama_decode(context, batch);
    });
}

// The row that the last evaluation ended with.
EMSCRIPTEN_KEEPALIVE const float * sequence_logits() { return llama_get_logits_ith(context, -1); }

struct sampler {
    llama_sampler * chain = nullptr;    // null: the likeliest token
    llama_sampler * grammar = nullptr;  // null: any
    std::vector<llama_token_data> candidates;

    ~sampler() {
        if (chain) llama_sampler_free(chain);
        if (grammar) llama_sampler_free(grammar);
    }

    llama_token draw(const float * row, bool by_grammar) {
        candidates.resize(llama_vocab_n_tokens(vocabulary));
        for (int i = 0; i < (int) candidates.size(); i++) candidates[i] = {i, row[i], 0.0f};
        llama_token_data_array array = {candidates.data(), candidates.size(), -1, false};
        if (by_grammar) llama_sampler_apply(grammar, &array);
        if (chain) {
            llama_sampler_apply(chain, &array);
            return array.data[array.selected].id;
        }
        auto less = [](const auto & one, const auto & other) { return one.logit < other.logit; };
        return std::max_element(array.data, array.data + array.size, less)->id;
    }

    bool fits(llama_token token) {
        llama_token_data one = {token, 0.0f, 0.0f};
        llama_token_data_array array = {&one, 1, -1, false};
        llama_sampler_apply(grammar, &array);
        return one.logit == 0.0f;
    }
};

EMSCRIPTEN_KEEPALIVE sampler * sampler_open(float temperature, uint32_t seed, const char * rules) {
    return guarded<sampler *>(nullptr, [&]() -> sampler * {
        auto made = std::make_unique<sampler>();
        if (*rules) {
            made->grammar = llama_sampler_init_grammar(vocabulary, rules, "root");
            if (!made->grammar) return nullptr;
        }
        if (temperature > 0) {
            made->chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
            llama_sampler_chain_add(made->chain, llama_sampler_init_temp(temperature));
            llama_sampler_chain_add(made->chain, llama_sampler_init_dist(seed));
        }
        return made.release();
    });
}

EMSCRIPTEN_KEEPALIVE void sampler_close(sampler * made) { delete made; }

// Chooses from the row that the last evaluation ended with.
EMSCRIPTEN_KEEPALIVE llama_token sampler_choose(sampler * made) {
    return guarded(-1, [&] {
        const float * row = sequence_logits();
        auto token = made->draw(row, false);
        // Most tokens fit, and asking the grammar about one costs little: about all of them, much.
        if (made->grammar && !made->fits(token)) token = made->draw(row, true);
        if (made->grammar) llama_sampler_accept(made->grammar, token);
        if (made->chain) llama_sampler_accept(made->chain, token);
        return token;
    });
}

// The GBNF that admits just the JSON of a schema.
EMSCRIPTEN_KEEPALIVE const char * schema_grammar(const char * schema) {
    return guarded<const char *>(nullptr, [&] { return returned(json_schema_to_grammar(common_json::parse(schema))); });
}

// A chat template's text for the names in a JSON object; blocks are trimmed as transformers has jinja2 do it.
EMSCRIPTEN_KEEPALIVE const char * template_render(const char * source, const char * names) {
    return guarded<const char *>(nullptr, [&] {
        auto program = jinja::parse_from_tokens(jinja::lexer().tokenize(source));
        jinja::context context(source);
        jinja::global_from_json(context, common_json::parse(names), false);
        context.set_val("raise_exception", jinja::mk_val<jinja::value_func>("raise_exception", refuse));
        auto result = jinja::runtime(context).execute(program);
        return returned(jinja::runtime::gather_string_parts(result)->as_string().str());
    });
}
}
