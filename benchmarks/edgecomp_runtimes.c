/* The runtimes, by the C interfaces of the libraries in their own packages; each is looked up when it is needed.
 *
 * Of their interfaces only what is used is declared. onnxruntime's is a table that only grows (version 10 of it is in
 * every onnxruntime since 1.10); LiteRT's are functions that changed between its versions: these are of 2.3. */
#include "edgecomp_runner.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "edgecomp_shared.h"

typedef void (*Function)(void);

/* A function by its name; ISO C knows no way from what dlsym gives to a function, POSIX says the bytes are the same. */
static Function found(void *library, const char *name, const char *place) {
  void *symbol = dlsym(library, name);
  Function function;
  if (!symbol) fail(WRONG_DEVICE, "%s: has no %s; it is another version of the library than expected", place, name);
  memcpy(&function, &symbol, sizeof function);
  return function;
}

static Model *new_model(const Runtime *runtime, const char *file, int n_threads) {
  Model *model = allocate(sizeof *model);
  memset(model, 0, sizeof *model);
  model->runtime = runtime;
  model->file = file;
  model->n_threads = n_threads;
  return model;
}

/* ---- onnxruntime ------------------------------------------------------------------------------------------------- */

enum { ORT_API = 10, ORT_ERRORS = 3, ORT_ALL_OPTIMIZATIONS = 99 };
enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3 };

typedef struct Status Status;

/* The table, with gaps; the numbers are places in it. */
typedef struct {
  Function gap_0[2];
  const char *(*GetErrorMessage)(const Status *);                                              /* 2 */
  Status *(*CreateEnv)(int level, const char *name, void **env);                               /* 3 */
  Function gap_4[3];
  Status *(*CreateSession)(const void *env, const char *path, const void *options, void **session); /* 7 */
  Function gap_8;
  Status *(*Run)(void *session, const void *options, const char *const *input_names, const void *const *inputs,
                 size_t n_inputs, const char *const *output_names, size_t n_outputs, void **outputs); /* 9 */
  Status *(*CreateSessionOptions)(void **options);                                             /* 10 */
  Function gap_11[3];
  Status *(*EnableProfiling)(void *options, const char *prefix);                               /* 14 */
  Function gap_15[7];
  Status *(*SetSessionLogSeverityLevel)(void *options, int level);                             /* 22 */
  Status *(*SetSessionGraphOptimizationLevel)(void *options, int level);                       /* 23 */
  Status *(*SetIntraOpNumThreads)(void *options, int n);                                       /* 24 */
  Status *(*SetInterOpNumThreads)(void *options, int n);                                       /* 25 */
  Function gap_26[4];
  Status *(*SessionGetInputCount)(const void *session, size_t *n);                             /* 30 */
  Status *(*SessionGetOutputCount)(const void *session, size_t *n);                            /* 31 */
  Function gap_32;
  Status *(*SessionGetInputTypeInfo)(const void *session, size_t i, void **type);              /* 33 */
  Function gap_34[2];
  Status *(*SessionGetInputName)(const void *session, size_t i, void *allocator, char **name); /* 36 */
  Status *(*SessionGetOutputName)(const void *session, size_t i, void *allocator, char **name); /* 37 */
  Function gap_38[11];
  Status *(*CreateTensorWithDataAsOrtValue)(const void *where, void *data, size_t bytes, const int64_t *shape,
                                            size_t rank, int type, void **value);              /* 49 */
  Function gap_50;
  Status *(*GetTensorMutableData)(void *value, void **data);                                   /* 51 */
  Function gap_52[3];
  Status *(*CastTypeInfoToTensorInfo)(const void *type, const void **tensor);                  /* 55 */
  Function gap_56[4];
  Status *(*GetTensorElementType)(const void *tensor, int *type);                              /* 60 */
  Status *(*GetDimensionsCount)(const void *tensor, size_t *n);                                /* 61 */
  Status *(*GetDimensions)(const void *tensor, int64_t *shape, size_t n);                      /* 62 */
  Function gap_63;
  Status *(*GetTensorShapeElementCount)(const void *tensor, size_t *n);                        /* 64 */
  Status *(*GetTensorTypeAndShape)(const void *value, void **tensor);                          /* 65 */
  Function gap_66[3];
  Status *(*CreateCpuMemoryInfo)(int allocator, int memory, void **where);                     /* 69 */
  Function gap_70[6];
  Status *(*AllocatorFree)(void *allocator, void *memory);                                     /* 76 */
  Function gap_77;
  Status *(*GetAllocatorWithDefaultOptions)(void **allocator);                                 /* 78 */
  Function gap_79[14];
  void (*ReleaseStatus)(Status *);                                                             /* 93 */
  Function gap_94;
  void (*ReleaseSession)(void *);                                                              /* 95 */
  void (*ReleaseValue)(void *);                                                                /* 96 */
  Function gap_97;
  void (*ReleaseTypeInfo)(void *);                                                             /* 98 */
  void (*ReleaseTensorTypeAndShapeInfo)(void *);                                               /* 99 */
  void (*ReleaseSessionOptions)(void *);                                                       /* 100 */
  Function gap_101[9];
  Status *(*SessionEndProfiling)(void *session, void *allocator, char **path);                 /* 110 */
  Function gap_111[19];
  Status *(*AddSessionConfigEntry)(void *options, const char *key, const char *value);         /* 130 */
  Function gap_131[2];
  Status *(*RunWithBinding)(void *session, const void *options, const void *binding);          /* 133 */
  Status *(*CreateIoBinding)(void *session, void **binding);                                   /* 134 */
  void (*ReleaseIoBinding)(void *);                                                            /* 135 */
  Status *(*BindInput)(void *binding, const char *name, const void *value);                    /* 136 */
  Status *(*BindOutput)(void *binding, const char *name, const void *value);                   /* 137 */
} Ort;
/* An array of -1 elements, where a gap were wrong. */
typedef char ort_is_in_order[offsetof(Ort, BindOutput) == 137 * sizeof(Function) ? 1 : -1];
typedef char ort_types_are_in_order[offsetof(Ort, ReleaseStatus) == 93 * sizeof(Function) ? 1 : -1];

typedef struct {
  const Ort *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtBase;

static const OrtBase *ort_base;
static const Ort *ort;
static void *ort_env, *ort_allocator, *ort_memory;

enum { ORT_SESSION, ORT_BINDING, ORT_INPUT_BUFFER };

static void ort_check(Status *status, const char *file, const char *what) {
  if (!status) return;
  fail(WRONG_USE, "%s: onnxruntime cannot %s it: %.300s", file, what, ort->GetErrorMessage(status));
}

static void ort_start(void *library, const char *place) {
  const OrtBase *(*base)(void) = (const OrtBase *(*)(void))found(library, "OrtGetApiBase", place);
  ort_base = base();
  ort = ort_base->GetApi(ORT_API);
  if (!ort) fail(WRONG_DEVICE, "%s: is older than onnxruntime 1.%d", place, ORT_API);
  ort_check(ort->CreateEnv(ORT_ERRORS, "edgecomp", &ort_env), place, "start");
  ort_check(ort->GetAllocatorWithDefaultOptions(&ort_allocator), place, "start");
  ort_check(ort->CreateCpuMemoryInfo(1, 0, &ort_memory), place, "start");
}

static const char *ort_version(void) { return ort_base->GetVersionString(); }

/* Bytes of an element by ONNX's number of its type; 0 where there is no such number. */
static size_t ort_element_bytes(int type) {
  static const unsigned char bytes[] = {0, 4, 1, 1, 2, 2, 4, 8, 0, 1, 2, 8, 4, 8, 8, 16, 2};
  return type >= 0 && (size_t)type < sizeof bytes ? bytes[type] : 0;
}

/* Make the input: one image. */
static void *ort_new_input(Model *model) {
  void *type, *value;
  const void *tensor;
  int64_t shape[8];
  size_t n, rank, i, elements = 1;
  int element;
  ort_check(ort->SessionGetInputCount(model->own[ORT_SESSION], &n), model->file, "load");
  if (n != 1) fail(WRONG_USE, "%s: the model has %zu inputs, expected one", model->file, n);
  ort_check(ort->SessionGetInputTypeInfo(model->own[ORT_SESSION], 0, &type), model->file, "load");
  ort_check(ort->CastTypeInfoToTensorInfo(type, &tensor), model->file, "load");
  if (!tensor) fail(WRONG_USE, "%s: its input is no tensor", model->file);
  ort_check(ort->GetTensorElementType(tensor, &element), model->file, "load");
  ort_check(ort->GetDimensionsCount(tensor, &rank), model->file, "load");
  if (rank < 2 || rank > 8 || (element != ORT_FLOAT && element != ORT_UINT8 && element != ORT_INT8))
    fail(WRONG_USE, "%s: its input has %zu axes of type %d, expected float, int8 or uint8", model->file, rank, element);
  ort_check(ort->GetDimensions(tensor, shape, rank), model->file, "load");
  ort->ReleaseTypeInfo(type);
  if (shape[0] < 1) shape[0] = 1;
  for (i = 0; i < rank; i++) {
    if (shape[i] < 1 || shape[i] > 1 << 24 || (elements *= (size_t)shape[i]) > 1u << 28)
      fail(WRONG_USE, "%s: its input has no fixed shape, but for N, or is very large", model->file);
  }
  model->input_kind = element == ORT_FLOAT ? REAL : element == ORT_INT8 ? SIGNED : UNSIGNED;
  model->input_bytes = elements * ort_element_bytes(element);
  model->own[ORT_INPUT_BUFFER] = allocate(model->input_bytes);
  memset(model->own[ORT_INPUT_BUFFER], 0, model->input_bytes);
  ort_check(ort->CreateTensorWithDataAsOrtValue(ort_memory, model->own[ORT_INPUT_BUFFER], model->input_bytes, shape,
                                                rank, element, &value), model->file, "load");
  return value;
}

/* Run once, so that onnxruntime allocates the outputs; from then on it writes into these. */
static void ort_bind(Model *model) {
  void *session = model->own[ORT_SESSION], *binding;
  char *input, **names;
  size_t i;
  ort_check(ort->SessionGetOutputCount(session, &model->n_outputs), model->file, "load");
  ort_check(ort->SessionGetInputName(session, 0, ort_allocator, &input), model->file, "load");
  names = allocate(model->n_outputs * sizeof *names);
  for (i = 0; i < model->n_outputs; i++)
    ort_check(ort->SessionGetOutputName(session, i, ort_allocator, &names[i]), model->file, "load");
  model->outputs = allocate(model->n_outputs * sizeof(void *));
  memset(model->outputs, 0, model->n_outputs * sizeof(void *));
  ort_check(ort->Run(session, NULL, (const char *const *)&input, (const void *const *)model->inputs, 1,
                     (const char *const *)names, model->n_outputs, model->outputs), model->file, "run");
  ort_check(ort->CreateIoBinding(session, &binding), model->file, "run");
  ort_check(ort->BindInput(binding, input, model->inputs[0]), model->file, "run");
  for (i = 0; i < model->n_outputs; i++)
    ort_check(ort->BindOutput(binding, names[i], model->outputs[i]), model->file, "run");
  model->own[ORT_BINDING] = binding;
  for (i = 0; i < model->n_outputs; i++)
    ort_check(ort->AllocatorFree(ort_allocator, names[i]), model->file, "run");
  ort_check(ort->AllocatorFree(ort_allocator, input), model->file, "run");
  free(names);
}

static Model *ort_load(const char *path, int n_threads, const char *profile) {
  Model *model = new_model(&runtimes[0], path, n_threads);
  void *options;
  ort_check(ort->CreateSessionOptions(&options), path, "load");
  ort_check(ort->SetIntraOpNumThreads(options, n_threads), path, "load");
  ort_check(ort->SetInterOpNumThreads(options, 1), path, "load");
  ort_check(ort->SetSessionGraphOptimizationLevel(options, ORT_ALL_OPTIMIZATIONS), path, "load");
  ort_check(ort->SetSessionLogSeverityLevel(options, ORT_ERRORS), path, "load");
  /* Idle workers would go on spinning, and slow down whatever is measured next. */
  if (n_threads > 1)
    ort_check(ort->AddSessionConfigEntry(options, "session.force_spinning_stop", "1"), path, "load");
  if (profile) ort_check(ort->EnableProfiling(options, profile), path, "load");
  ort_check(ort->CreateSession(ort_env, path, options, &model->own[ORT_SESSION]), path, "load");
  ort->ReleaseSessionOptions(options);
  model->inputs = allocate(sizeof(void *));
  model->inputs[0] = ort_new_input(model);
  return model;
}

static void ort_infer(Model *model) {
  if (!model->own[ORT_BINDING]) ort_bind(model);
  ort_check(ort->RunWithBinding(model->own[ORT_SESSION], NULL, model->own[ORT_BINDING]), model->file, "run");
}

static void ort_set(Model *model, const void *bytes) {
  memcpy(model->own[ORT_INPUT_BUFFER], bytes, model->input_bytes);
}

static Border ort_output(Model *model, size_t i) {
  Border border;
  void *tensor;
  size_t n;
  int type;
  ort_check(ort->GetTensorTypeAndShape(model->outputs[i], &tensor), model->file, "run");
  ort_check(ort->GetTensorShapeElementCount(tensor, &n), model->file, "run");
  ort_check(ort->GetTensorElementType(tensor, &type), model->file, "run");
  ort->ReleaseTensorTypeAndShapeInfo(tensor);
  border.bytes = n * ort_element_bytes(type);
  ort_check(ort->GetTensorMutableData(model->outputs[i], &border.data), model->file, "run");
  return border;
}

static void ort_describe(const Model *model, FILE *out) {
  fprintf(out, "{\"providers\": [\"CPUExecutionProvider\"], \"graph_optimization\": \"all\", \"intra_op_threads\": %d, "
               "\"inter_op_threads\": 1, \"spins_between_runs\": false}", model->n_threads);
}

static char *ort_profiled(Model *model, size_t *n) {
  char *path, *text;
  int i;
  /* The run that binds comes first and does not count. */
  for (i = 0; i < PROFILED_RUNS; i++) ort_infer(model);
  ort_check(ort->SessionEndProfiling(model->own[ORT_SESSION], ort_allocator, &path), model->file, "profile");
  text = read_whole(path, n);
  unlink(path);
  ort_check(ort->AllocatorFree(ort_allocator, path), model->file, "profile");
  return text;
}

static void ort_release(Model *model) {
  size_t i;
  if (model->own[ORT_BINDING]) ort->ReleaseIoBinding(model->own[ORT_BINDING]);
  for (i = 0; i < model->n_outputs; i++) ort->ReleaseValue(model->outputs[i]);
  ort->ReleaseValue(model->inputs[0]);
  ort->ReleaseSession(model->own[ORT_SESSION]);
  free(model->own[ORT_INPUT_BUFFER]);
  free(model->outputs);
  free(model->inputs);
  free(model);
}

/* ---- LiteRT ------------------------------------------------------------------------------------------------------ */

enum { LITERT_CPU = 1, LITERT_READ = 0, LITERT_WRITE = 1 };
enum { LITERT_FLOAT = 1, LITERT_UINT8 = 3, LITERT_INT8 = 9 };

typedef struct {
  int element;
  unsigned int rank : 7;
  unsigned int has_strides : 1;
  int32_t shape[8];
  uint32_t strides[8];
} LiteRtType;

/* Functions, by the names they have after LiteRt; each gives 0 where all is well. */
#define LITERT_FUNCTIONS(X)                                                              \
  X(CreateEnvironment, (int n, const void *options, void **env))                         \
  X(CreateModelFromFile, (void *env, const char *path, void **model))                    \
  X(GetModelSignature, (void *model, size_t i, void **signature))                        \
  X(GetNumSignatureInputs, (void *signature, size_t *n))                                 \
  X(GetNumSignatureOutputs, (void *signature, size_t *n))                                \
  X(GetSignatureInputTensorByIndex, (void *signature, size_t i, void **tensor))          \
  X(GetSignatureOutputTensorByIndex, (void *signature, size_t i, void **tensor))         \
  X(GetRankedTensorType, (void *tensor, LiteRtType *type))                               \
  X(CreateOptions, (void **options))                                                     \
  X(SetOptionsHardwareAccelerators, (void *options, int accelerators))                   \
  X(CreateOpaqueOptions, (const char *name, void *text, void (*done)(void *), void **opaque)) \
  X(AddOpaqueOptions, (void *options, void *opaque))                                     \
  X(CreateCompiledModel, (void *env, void *model, void *options, void **compiled))       \
  X(CompiledModelIsFullyAccelerated, (void *compiled, _Bool *all))                       \
  X(GetCompiledModelInputBufferRequirements, (void *compiled, size_t signature, size_t i, void **needs))  \
  X(GetCompiledModelOutputBufferRequirements, (void *compiled, size_t signature, size_t i, void **needs)) \
  X(CreateManagedTensorBufferFromRequirements, (void *env, const LiteRtType *type, void *needs, void **buffer)) \
  X(GetTensorBufferPackedSize, (void *buffer, size_t *bytes))                            \
  X(LockTensorBuffer, (void *buffer, void **data, int mode))                             \
  X(UnlockTensorBuffer, (void *buffer))                                                  \
  X(RunCompiledModel, (void *compiled, size_t signature, size_t n, void **inputs, size_t m, void **outputs))
#define LITERT_RELEASES(X) X(DestroyOptions) X(DestroyCompiledModel) X(DestroyModel) X(DestroyTensorBuffer)

#define DECLARE(name, arguments) int (*name) arguments;
#define DECLARE_RELEASE(name) void (*name)(void *);
static struct {
  LITERT_FUNCTIONS(DECLARE)
  LITERT_RELEASES(DECLARE_RELEASE)
} litert;
static void *litert_env;

enum { LITERT_MODEL, LITERT_COMPILED };

/* What is wrong LiteRT says on standard error, which `fail` looks through. */
static void litert_check(int status, const char *file, const char *what) {
  if (status) fail(WRONG_USE, "%s: litert cannot %s it (status %d)", file, what, status);
}

static void litert_start(void *library, const char *place) {
#define LOOK_UP(name, arguments) litert.name = (int(*) arguments)found(library, "LiteRt" #name, place);
#define LOOK_UP_RELEASE(name) litert.name = (void (*)(void *))found(library, "LiteRt" #name, place);
  LITERT_FUNCTIONS(LOOK_UP)
  LITERT_RELEASES(LOOK_UP_RELEASE)
  litert_check(litert.CreateEnvironment(0, NULL, &litert_env), place, "start");
}

static void *litert_buffer(Model *model, void *signature, size_t i, int is_input, LiteRtType *type) {
  void *tensor, *needs, *buffer, *compiled = model->own[LITERT_COMPILED];
  litert_check((is_input ? litert.GetSignatureInputTensorByIndex : litert.GetSignatureOutputTensorByIndex)(
                   signature, i, &tensor), model->file, "load");
  litert_check(litert.GetRankedTensorType(tensor, type), model->file, "load");
  litert_check((is_input ? litert.GetCompiledModelInputBufferRequirements
                         : litert.GetCompiledModelOutputBufferRequirements)(compiled, 0, i, &needs),
               model->file, "load");
  litert_check(litert.CreateManagedTensorBufferFromRequirements(litert_env, type, needs, &buffer), model->file, "load");
  return buffer;
}

static void litert_borders(Model *model) {
  LiteRtType type;
  void *signature;
  size_t n, i;
  litert_check(litert.GetModelSignature(model->own[LITERT_MODEL], 0, &signature), model->file, "load");
  litert_check(litert.GetNumSignatureInputs(signature, &n), model->file, "load");
  litert_check(litert.GetNumSignatureOutputs(signature, &model->n_outputs), model->file, "load");
  if (n != 1 || !model->n_outputs)
    fail(WRONG_USE, "%s: the model has %zu inputs and %zu outputs", model->file, n, model->n_outputs);
  model->outputs = allocate(model->n_outputs * sizeof(void *));
  for (i = 0; i < model->n_outputs; i++) model->outputs[i] = litert_buffer(model, signature, i, 0, &type);
  model->inputs = allocate(sizeof(void *));
  model->inputs[0] = litert_buffer(model, signature, 0, 1, &type);
  if (type.element != LITERT_FLOAT && type.element != LITERT_INT8 && type.element != LITERT_UINT8)
    fail(WRONG_USE, "%s: its input is of type %d, expected float, int8 or uint8", model->file, type.element);
  model->input_kind = type.element == LITERT_FLOAT ? REAL : type.element == LITERT_INT8 ? SIGNED : UNSIGNED;
  litert_check(litert.GetTensorBufferPackedSize(model->inputs[0], &model->input_bytes), model->file, "load");
}

static Model *litert_load(const char *path, int n_threads, const char *profile) {
  Model *model = new_model(&runtimes[1], path, n_threads);
  void *options, *opaque;
  char *text = allocate(32);
  _Bool all = 0;
  (void)profile;
  sprintf(text, "num_threads = %d\n", n_threads);
  litert_check(litert.CreateModelFromFile(litert_env, path, &model->own[LITERT_MODEL]), path, "load");
  litert_check(litert.CreateOptions(&options), path, "load");
  litert_check(litert.SetOptionsHardwareAccelerators(options, LITERT_CPU), path, "load");
  litert_check(litert.CreateOpaqueOptions("xnnpack", text, free, &opaque), path, "load");
  litert_check(litert.AddOpaqueOptions(options, opaque), path, "load");
  litert_check(litert.CreateCompiledModel(litert_env, model->own[LITERT_MODEL], options, &model->own[LITERT_COMPILED]),
               path, "load");
  litert.DestroyOptions(options);
  litert_check(litert.CompiledModelIsFullyAccelerated(model->own[LITERT_COMPILED], &all), path, "load");
  model->all_delegated = all;
  litert_borders(model);
  return model;
}

static void litert_infer(Model *model) {
  int status = litert.RunCompiledModel(model->own[LITERT_COMPILED], 0, 1, model->inputs, model->n_outputs,
                                       model->outputs);
  if (status)
    fail(WRONG_USE, "%s: litert cannot run it (status %d; a packed file is unpacked first, by edgecomp unpack)",
         model->file, status);
}

static void litert_set(Model *model, const void *bytes) {
  void *data;
  litert_check(litert.LockTensorBuffer(model->inputs[0], &data, LITERT_WRITE), model->file, "run");
  memcpy(data, bytes, model->input_bytes);
  litert_check(litert.UnlockTensorBuffer(model->inputs[0]), model->file, "run");
}

static Border litert_output(Model *model, size_t i) {
  Border border;
  litert_check(litert.GetTensorBufferPackedSize(model->outputs[i], &border.bytes), model->file, "run");
  litert_check(litert.LockTensorBuffer(model->outputs[i], &border.data, LITERT_READ), model->file, "run");
  litert_check(litert.UnlockTensorBuffer(model->outputs[i]), model->file, "run");
  return border;
}

static void litert_describe(const Model *model, FILE *out) {
  fprintf(out, "{\"kernels\": \"default\", \"interface\": \"compiled model\", \"all_nodes_in_xnnpack\": %s, "
               "\"threads\": %d}", model->all_delegated ? "true" : "false", model->n_threads);
}

static void litert_release(Model *model) {
  size_t i;
  for (i = 0; i < model->n_outputs; i++) litert.DestroyTensorBuffer(model->outputs[i]);
  litert.DestroyTensorBuffer(model->inputs[0]);
  litert.DestroyCompiledModel(model->own[LITERT_COMPILED]);
  litert.DestroyModel(model->own[LITERT_MODEL]);
  free(model->outputs);
  free(model->inputs);
  free(model);
}

/* ---- all of them ------------------------------------------------------------------------------------------------- */

static const unsigned char tiny_onnx[] = {TINY_ONNX}, tiny_tflite[] = {TINY_TFLITE};

const Runtime runtimes[] = {
    {"onnxruntime", "onnx", "libonnxruntime.so.", tiny_onnx, sizeof tiny_onnx, ort_start, ort_version, ort_load,
     ort_infer, ort_set, ort_output, ort_describe, ort_profiled, ort_release},
    {"litert", "tflite", "libLiteRt.so.", tiny_tflite, sizeof tiny_tflite, litert_start, NULL, litert_load,
     litert_infer, litert_set, litert_output, litert_describe, NULL, litert_release},
};
const size_t n_runtimes = sizeof runtimes / sizeof *runtimes;
